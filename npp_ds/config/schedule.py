"""The stage table of a run as pure functions of (config, step), without torch and without state."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from npp_ds.sizes import num_positions


def stage_ends(epochs: int, levels: int, ratio: float) -> list[int]:
    """Return the epochs at which the stages end, coarse to fine: int(E r^i) for i = L-1 .. 0.

    The formula is that of NPP (arXiv 2412.15321, appendix).

    >>> stage_ends(300, 4, 0.5)
    [37, 75, 150, 300]
    """
    return [int(epochs * ratio**i) for i in range(levels - 1, -1, -1)]


def coarse_batch_factor(patch_side: int, most: int) -> int:
    """Return the factor on a stage's batch size: min(most, p * p); p * p gives a step as many positions as at side 1.

    The learning rate is scaled by its square root, the rule for Adam (Malladi et al., arXiv 2205.10287).
    """
    return min(most, patch_side * patch_side)


@dataclass(frozen=True)
class StageEntry:
    """A row of a config's stage table. Its length is in epochs or in steps; `micro_batch_size` is an upper limit."""

    patch_side: int
    epochs: float | None
    steps: int | None
    batch_size: int
    micro_batch_size: int | None
    learning_rate: float
    final_learning_rate: float
    warmup_epochs: float
    decay_fraction: float
    dropout_scale: float

    def length(self, steps_per_epoch: int) -> int:
        """Return the length in optimizer steps."""
        return self.steps or round((self.epochs or 0) * steps_per_epoch)

    def warmup_steps(self, steps_per_epoch: int) -> int:
        return round(self.warmup_epochs * steps_per_epoch)


@dataclass(frozen=True)
class Stage:
    """The steps `start_step` .. `end_step - 1` at one patch side. A stage begins with a new epoch."""

    index: int
    patch_side: int
    start_step: int
    end_step: int
    start_epoch: int
    steps_per_epoch: int
    batch_size: int
    micro_batch_size: int
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    decay_steps: int
    dropout_scale: float = 1.0

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step

    @property
    def end_epoch(self) -> int:
        """Return the index of the first epoch of the next stage."""
        return self.start_epoch - (-self.steps // self.steps_per_epoch)

    def epoch_at(self, step: int) -> tuple[int, int]:
        """Return (epoch of the run, index of the batch within that epoch), both counted from 0."""
        epochs, index = divmod(step - self.start_step, self.steps_per_epoch)
        return self.start_epoch + epochs, index

    def learning_rate(self, step: int) -> float:
        """Return the rate of linear warm-up, constant peak, and linear decay to the final rate at the last step."""
        done = step - self.start_step + 1
        if done <= self.warmup_steps:
            return self.peak_learning_rate * done / self.warmup_steps
        decayed = done - (self.steps - self.decay_steps)
        if decayed <= 0:
            return self.peak_learning_rate
        fall = self.peak_learning_rate - self.final_learning_rate
        return self.peak_learning_rate - fall * decayed / self.decay_steps


@dataclass(frozen=True)
class Schedule:
    """The stages of a run in order. Steps count from 0 over the whole run."""

    stages: tuple[Stage, ...]

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end_step

    def stage_at(self, step: int) -> Stage:
        """Return the stage of a step. Raises IndexError outside 0 .. total_steps - 1."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside 0 .. {self.total_steps - 1}")
        return self.stages[bisect_right([s.start_step for s in self.stages], step) - 1]

    def learning_rate(self, step: int) -> float:
        return self.stage_at(step).learning_rate(step)

    def _relative_cost(self, cost_of_side: Callable[[int], float]) -> float:
        spent = sum(s.steps * s.batch_size * cost_of_side(s.patch_side) for s in self.stages)
        return spent / (sum(s.steps * s.batch_size for s in self.stages) * cost_of_side(1))

    def token_cost(self) -> float:
        """Return the number of positions trained, relative to next-token training on the same images."""
        return self._relative_cost(lambda side: 1 / side**2)

    def flop_cost(self, grid_size: int, flops: Callable[[int], int]) -> float:
        """Return the FLOPs relative to next-token training on the same images; `flops(positions)` is for one image."""
        return self._relative_cost(lambda side: flops(num_positions(grid_size, side)))


def build_schedule(table: Sequence[StageEntry], num_samples: int, world_size: int = 1) -> Schedule:
    """Return the schedule of a stage table on `num_samples` training images."""
    stages, step, epoch = [], 0, 0
    for index, s in enumerate(table):
        steps_per_epoch = num_samples // s.batch_size
        steps, warmup_steps = s.length(steps_per_epoch), s.warmup_steps(steps_per_epoch)
        stage = Stage(
            index=index,
            patch_side=s.patch_side,
            start_step=step,
            end_step=step + steps,
            start_epoch=epoch,
            steps_per_epoch=steps_per_epoch,
            batch_size=s.batch_size,
            micro_batch_size=_micro_batch_size(s.batch_size // world_size, s.micro_batch_size),
            peak_learning_rate=s.learning_rate,
            final_learning_rate=s.final_learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=min(round(s.decay_fraction * steps), steps - warmup_steps),
            dropout_scale=s.dropout_scale,
        )
        stages.append(stage)
        step, epoch = stage.end_step, stage.end_epoch
    return Schedule(tuple(stages))


def _micro_batch_size(rows: int, most: int | None) -> int:
    """Return the largest divisor of `rows`, a process's share of the batch, that is at most `most`."""
    return next(size for size in range(min(rows, most or rows), 0, -1) if rows % size == 0)
