"""How fast a run is and how long it waits for data: the clock of training, and the figures of a logged interval."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from npp_ds.config.schedule import Stage
from npp_ds.config.schema import ModelSection
from npp_ds.sizes import num_positions
from npp_ds.utils.gpu_specs import gpu_of_device


@dataclass(frozen=True)
class Lap:
    """Work since the last lap, in seconds of training; `data_wait_share` is the part of them spent waiting for data."""

    seconds: float
    steps: int
    images: int
    data_wait_share: float

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / max(1, self.steps)


class Clock:
    """Count seconds of training (without validation, evaluation and saving).

    Whoever trains adds its `steps` and `images` of the current lap.
    """

    def __init__(self, elapsed_before: float):
        self._before, self._started = elapsed_before, time.perf_counter()
        self.steps = self.images = 0
        self._data_waited = 0.0
        self._mark = self._started
        self._paused_since: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds of training since the run's first start, without validation, evaluation and saving."""
        return self._before + (self._paused_since or time.perf_counter()) - self._started

    def lap(self, data_waited: float) -> Lap:
        """Return what happened since the last call; `data_waited` is the time spent waiting for data so far."""
        now = time.perf_counter()
        seconds = now - self._mark
        lap = Lap(seconds, self.steps, self.images, (data_waited - self._data_waited) / seconds)
        self._mark, self.images, self.steps, self._data_waited = now, 0, 0, data_waited
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside."""
        began = self._paused_since = time.perf_counter()
        try:
            yield
        finally:
            self._paused_since = None
            lost = time.perf_counter() - began
            self._started += lost
            self._mark += lost


def speed(
    lap: Lap, stage: Stage, model: ModelSection, world_size: int, peak_tflops: float | None
) -> dict[str, float | None]:
    """Return the rates of a lap within one stage, as metrics.jsonl names them.

    Images and positions are those of all processes, FLOPs those of one: `npp_ds.sizes.training_flops` per image over
    the time of the whole step. `mfu` is their share of the device's peak, None where that is unknown.
    """
    positions = num_positions(model.grid_size, stage.patch_side)
    images_per_second = lap.images / lap.seconds
    tflops = images_per_second * model.training_flops(positions) / world_size / 1e12
    return {
        "images_per_second": images_per_second,
        "positions_per_second": images_per_second * positions,
        "model_tflops_per_second": tflops,
        "mfu": tflops / peak_tflops if peak_tflops else None,
    }


def peak_tflops(device: torch.device) -> float | None:
    """Return a device's dense bf16 rate in TFLOP/s by its data sheet; None for CPUs and for unknown GPUs."""
    gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.tflops if gpu else None


def take_peak_memory_gb(device: torch.device) -> float:
    """Return the most memory held at once, in 10^9 bytes.

    On a GPU by tensors since the last call, on a CPU by this process since its start (its resident set).
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
