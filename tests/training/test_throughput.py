"""How fast a run is: positions, FLOPs and their share of the peak, memory, and the share of time waiting for data."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from npp_ds.config.load import load_config
from npp_ds.config.schedule import Stage
from npp_ds.config.schema import ModelSection
from npp_ds.sizes import training_flops
from npp_ds.training.throughput import Clock, Lap, StepCosts, peak_tflops, speed, take_peak_memory_gb

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
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
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


QUICKSTART = load_config("quickstart")
SCHEDULE = QUICKSTART.build_schedule(9000)
RATES = {4: 1250.0, 2: 620.0, 1: 210.0}
"""Images per second of a quickstart on two CPU cores: less apart than FLOPs (1 : 4 : 16)."""


def quickstart_lines(done: int, rates: dict[int, float] = RATES) -> list[dict]:
    """A training line after the first and every tenth of `done` steps; the first of a stage has half its rate."""
    lines, before = [], None
    for step in [1, *range(10, done + 1, 10)]:
        stage = SCHEDULE.stage_at(step - 1)
        rate = rates[stage.patch_side] / (1 if stage == before else 2)
        lines.append({"step": step, "stage": stage.index, "images_per_second": rate})
        before = stage
    return lines


def quickstart_seconds(first: int, last: int) -> float:
    return sum(64 / RATES[SCHEDULE.stage_at(step).patch_side] for step in range(first, last))


@pytest.mark.parametrize("done", [200, 350, 560, 600, 900, 1120])
def test_the_time_left_is_right_across_the_quickstarts_stages(done):
    left = StepCosts(SCHEDULE.stages, QUICKSTART.model, quickstart_lines(done)).left(done)
    assert [s.end_step for s in SCHEDULE.stages] == [140, 560, 1120]
    stage = SCHEDULE.stage_at(done - 1)
    assert sum(left) == pytest.approx(quickstart_seconds(done, 1120), rel=0.05)
    assert left[stage.index] == pytest.approx(quickstart_seconds(done, stage.end_step), rel=0.05)
    if done == 350:
        at_this_rate = (1120 - 350) * 64 / RATES[2]
        assert sum(left) > 2 * at_this_rate


def test_a_stage_without_figures_costs_what_the_nearest_one_does_by_flops():
    costs = StepCosts(SCHEDULE.stages, QUICKSTART.model)
    assert costs.left(0) == []
    costs.add({"step": 1, "stage": 0})  # no rate
    assert costs.left(1) == []
    for line in quickstart_lines(100):
        costs.add(line)
    flops = [QUICKSTART.model.training_flops(positions) for positions in (4, 16, 64)]
    expected = [64 / RATES[4] * n * f / flops[0] for n, f in zip((40, 420, 560), flops, strict=True)]
    assert costs.left(100) == pytest.approx(expected)
    assert costs.left_at_most(100), "its part that does not grow with FLOPs is unknown"
    only_fine = StepCosts(SCHEDULE.stages, QUICKSTART.model, [{"step": 570, "stage": 2, "images_per_second": 210.0}])
    assert only_fine.left(1120) == [0, 0, 0] and only_fine.left(140)[0] == 0
    assert not only_fine.left_at_most(140)
    assert not StepCosts(SCHEDULE.stages, QUICKSTART.model, quickstart_lines(150)).left_at_most(150)


@pytest.mark.parametrize("rates, factor", [({4: 300.0, 2: 620.0, 1: 1.0}, 1.0), ({4: 1e6, 2: 100.0, 1: 1.0}, None)])
def test_figures_of_two_stages_never_say_less_than_now_or_more_than_by_flops(rates, factor):
    """After a resume on other hardware the stages' costs may not fit together."""
    costs = StepCosts(SCHEDULE.stages, QUICKSTART.model, quickstart_lines(400, rates))
    factor = factor or QUICKSTART.model.training_flops(64) / QUICKSTART.model.training_flops(16)
    assert costs.seconds_per_step(2) == pytest.approx(factor * costs.seconds_per_step(1))


def test_the_time_left_follows_a_run_that_is_resumed_on_faster_hardware():
    lines = [
        *quickstart_lines(300),
        *(line for line in quickstart_lines(360, {4: 1.0, 2: 2480.0}) if line["step"] > 300),
    ]
    costs = StepCosts(SCHEDULE.stages, QUICKSTART.model, lines)
    assert costs.seconds_per_step(1) == pytest.approx(64 / 2480)


def test_the_time_left_needs_no_torch():
    code = "import sys, npp_ds.training.throughput; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
