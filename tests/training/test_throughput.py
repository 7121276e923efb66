"""How fast a run is: positions, FLOPs and their share of the peak, memory, and the share of time waiting for data."""

import sys
import time
from pathlib import Path

import pytest
import torch

from npp_ds.config.schedule import Stage
from npp_ds.config.schema import ModelSection
from npp_ds.sizes import training_flops
from npp_ds.training import throughput
from npp_ds.training.throughput import Clock, Lap, peak_tflops, speed, take_peak_memory_gb

MODEL = ModelSection(size="B")


def stage_of(patch_side: int) -> Stage:
    return Stage(0, patch_side, 0, 100, 0, 10, 256, 32, 1e-4, 1e-5, 0, 0)


@pytest.mark.parametrize("side, positions", [(1, 256), (2, 64), (8, 4)])
def test_model_flops_are_those_of_one_process_over_the_whole_time(side, positions):
    lap = Lap(seconds=2.0, steps=10, images=2560, data_wait_share=0.0)
    found = speed(lap, stage_of(side), MODEL, world_size=4, peak_tflops=500.0)
    assert found["images_per_second"] == 1280 and found["positions_per_second"] == 1280 * positions
    flops = 1280 / 4 * training_flops(positions, dim=768, n_layers=12, n_heads=12)
    assert found["model_tflops_per_second"] == pytest.approx(flops / 1e12)
    assert found["mfu"] == pytest.approx(flops / 500e12)
    assert speed(lap, stage_of(side), MODEL, 4, None)["mfu"] is None
    assert lap.seconds_per_step == 0.2


def test_a_lap_counts_images_time_and_the_wait_for_data_since_the_lap_before():
    clock = Clock(100.0)
    began = time.perf_counter()
    for _ in range(3):
        clock.steps += 1
        clock.images += 16
    time.sleep(0.03)
    with clock.paused():
        time.sleep(0.1)
    lap = clock.lap(data_waited=0.01)
    assert (lap.steps, lap.images) == (3, 48)
    assert 0.03 <= lap.seconds <= time.perf_counter() - began - 0.1, "pauses apart"
    assert lap.data_wait_share == pytest.approx(0.01 / lap.seconds)
    assert 100.03 <= clock.elapsed <= 100 + time.perf_counter() - began - 0.1
    time.sleep(0.01)
    after = clock.lap(data_waited=0.01)
    assert (after.steps, after.images, after.data_wait_share) == (0, 0, 0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_process_is_the_peak_of_its_resident_set():
    block = bytearray(b"1") * (64 << 20)
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    expected = int(status["VmHWM"].split()[0]) * 1024 / 1e9
    del block
    assert take_peak_memory_gb(torch.device("cpu")) == pytest.approx(expected, rel=0.02)


def test_the_peak_rate_is_that_of_the_device_or_unknown(monkeypatch):
    assert peak_tflops(torch.device("cpu")) is None
    names = {0: "NVIDIA H100 80GB HBM3", 1: "NVIDIA H100 PCIe"}
    monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda device: names[device.index])
    assert [peak_tflops(torch.device("cuda", i)) for i in (0, 1)] == [989.4, None]


@pytest.mark.gpu
def test_memory_of_a_gpu_is_the_peak_since_it_was_last_asked():
    device = torch.device("cuda", 0)
    take_peak_memory_gb(device)
    before = torch.cuda.memory_allocated(device)
    block = torch.empty(10**8, dtype=torch.uint8, device=device)
    del block
    assert take_peak_memory_gb(device) == pytest.approx((before + 1e8) / 1e9, rel=0.05)
    assert take_peak_memory_gb(device) == pytest.approx(before / 1e9, rel=0.05)
