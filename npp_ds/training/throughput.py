"""How fast a run is and what time it still needs: the clock of training, the figures of a logged interval, the ETA.

Imports torch only to ask a device.
"""

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from npp_ds.config.schedule import Stage
from npp_ds.config.schema import ModelSection
from npp_ds.sizes import num_positions
from npp_ds.utils.gpu_specs import gpu_of_device

if TYPE_CHECKING:
    import torch

RECENT = 9
"""Training lines of a stage whose median is the cost of its steps; after a resume on other hardware it changes soon."""


@dataclass(frozen=True)
class Lap:
    """Work since the last lap, in seconds of training; `data_wait_share` is the part of them spent waiting for data."""

    seconds: float
    steps: int
    images: int
    data_wait_share: float


class StepCosts:
    """The seconds that a step takes in each stage of a run, and so the time left (the ETA).

    For a stage with training lines it is the median of the last `RECENT`, without the stage's first one, which includes
    the warm-up. For another stage, that of the nearest such stage is scaled by the ratio of their FLOPs; with two such
    stages a linear fit against FLOPs is used, since a part of a step does not depend on its FLOPs.
    """

    def __init__(self, stages: Sequence[Stage], model: ModelSection, lines: Iterable[dict[str, Any]] = ()):
        """`lines` are the events "train" of metrics.jsonl so far."""
        self.stages = stages
        self._flops = [step_flops(model, stage, stage.patch_side) for stage in stages]
        self._measured: dict[int, list[float]] = {}
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Take note of a training line; one without a rate says nothing."""
        stage: int = line.get("stage", -1)
        if (rate := line.get("images_per_second")) and stage in range(len(self.stages)):
            self._measured.setdefault(stage, []).append(self.stages[stage].batch_size / rate)

    def seconds_per_step(self, index: int) -> float:
        """Return the cost of a stage's steps, once there is a training line of any stage."""
        nearest, *others = sorted(self._measured, key=lambda other: abs(other - index))
        cost, flops, known = self._cost(nearest), self._flops[index], self._flops[nearest]
        in_proportion = cost * flops / known
        if not others or known == self._flops[others[0]]:
            return in_proportion
        slope = (cost - self._cost(others[0])) / (known - self._flops[others[0]])
        least, most = sorted((cost, in_proportion))
        return min(max(cost + slope * (flops - known), least), most)

    def _cost(self, index: int) -> float:
        costs = self._measured[index]
        return median(costs[max(1, len(costs) - RECENT) :] or costs)

    def left(self, done: int) -> list[float]:
        """Return the seconds of training left in each stage after `done` steps; [] before any training line.

        Validation, evaluation and saving come on top.
        """
        if not self._measured:
            return []
        steps = (stage.end_step - min(max(done, stage.start_step), stage.end_step) for stage in self.stages)
        return [n * self.seconds_per_step(index) for index, n in enumerate(steps)]

    def left_at_most(self, done: int) -> bool:
        """Return whether `left` is an upper bound: one stage is measured, and stages of more FLOPs per step are left.

        Their cost is then in proportion to FLOPs, though a part of each step does not grow with them.
        """
        if len(self._measured) != 1:
            return False
        (known,) = self._measured
        return any(
            flops > self._flops[known] and stage.end_step > done
            for stage, flops in zip(self.stages, self._flops, strict=True)
        )


def step_flops(model: ModelSection, stage: Stage, patch_side: int) -> int:
    """Return the model FLOPs of a step on a stage's batch at `patch_side`."""
    return stage.batch_size * model.training_flops(num_positions(model.grid_size, patch_side))


class Clock:
    """Count seconds of training (without validation, evaluation and saving).

    The training loop adds its `steps` and `images` of the current lap.
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
        """Leave out the time spent inside; in a block that is paused already, this changes nothing."""
        if self._paused_since is not None:
            yield
            return
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


def peak_tflops(device: "torch.device") -> float | None:
    """Return a device's dense bf16 rate in TFLOP/s by its data sheet; None for CPUs and for unknown GPUs."""
    import torch

    gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.tflops if gpu else None


def take_peak_memory_gb(device: "torch.device") -> float:
    """Return the most memory held at once, in 10^9 bytes.

    On a GPU by tensors since the last call, on a CPU by this process since its start (its resident set).
    """
    if device.type == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
