"""Checks of every loss: the first one of a fresh run, spikes, and losses or gradients that are not finite."""

import logging
import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from npp_ds.checkpoint.folders import CheckpointRecord
from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import StepBatch
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.training.engine import StepResult
from npp_ds.training.hooks import FinishedStep, Hook
from npp_ds.training.run_log import RunLog

logger = logging.getLogger(__name__)

RELATIVE_FLOOR = 1e-3
"""Smallest standard deviation, relative to the mean: in a loss that does not move, rounding is no spike."""
MAX_ROLLBACKS = 3
MAX_SKIPS = 10  # in a row


@dataclass(frozen=True)
class Spike:
    """A loss, with the mean and the standard deviation of the losses that it exceeds."""

    loss: float
    mean: float
    std: float


class SpikeRule:
    """Find losses of more than `threshold` standard deviations above the mean of the last `window` of the stage.

    The first `window // 2` losses of a stage are not judged. Spikes do not enter the window. A window of 0 finds none.
    """

    def __init__(self, window: int, threshold: float):
        self.window, self.threshold = window, threshold
        self._stage: int | None = None
        self._losses: deque[float] = deque(maxlen=window)

    def observe(self, stage: int, loss: float) -> Spike | None:
        """Return a `Spike` if the next loss of `stage` is one, else None. A loss that is not finite is ignored."""
        if self.window == 0 or not math.isfinite(loss):
            return None
        if stage != self._stage:
            self._stage = stage
            self._losses.clear()
        if len(self._losses) >= max(1, self.window // 2):
            mean = math.fsum(self._losses) / len(self._losses)
            variance = math.fsum((x - mean) ** 2 for x in self._losses) / len(self._losses)
            std = max(math.sqrt(variance), RELATIVE_FLOOR * abs(mean))
            if loss - mean > self.threshold * std:
                return Spike(loss, mean, std)
        self._losses.append(loss)
        return None


class LossChecks(Hook):
    """Warn of spikes; stop a fresh run whose first loss is not ln(vocabulary)."""

    def __init__(self, config: RunConfig, processes: Processes, log: RunLog):
        self.config, self.processes, self.log = config, processes, log
        self.reset()

    def reset(self) -> None:
        """Forget the losses so far: they belong to weights that were rolled back."""
        self._rule = SpikeRule(self.config.watch.spike_window, self.config.watch.spike_threshold)

    def after_step(self, step: FinishedStep) -> None:
        """Check one loss. Raises UserError when the first one of a fresh run is not ln(vocabulary)."""
        if step.result is None:
            return
        expected = math.log(self.config.model.vocab_size)
        if step.batch.step == 0 and not self.config.init_from and abs(step.loss - expected) > 1e-3:
            raise UserError(
                f"the first loss of a fresh run is {step.loss:.5f}, not ln(vocab_size) = {expected:.5f}: its output "
                "head starts at zero, so either the weights are not fresh or codes and loss do not fit; check "
                "model.vocab_size, the shards and changes of the model, and start in a new run_dir",
                on_all_ranks=True,
            )
        if spike := self._rule.observe(step.stage.index, step.loss):
            ids = [i for part in self.processes.gather(step.batch.ids.tolist()) for i in part]
            self.log.write("spike", step.done, stage=step.stage.index, **asdict(spike), sample_ids=ids)
            logger.warning(
                f"step {step.batch.step} (stage {step.stage.index}): loss {spike.loss:.4f} is a spike, the mean of the "
                f"last ones is {spike.mean:.4f} (standard deviation {spike.std:.4f}); sample ids: {_joined(ids)}"
            )


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm of a step is not finite; the weights are those from before the step."""


class NonFinitePolicy:
    """What follows a step whose loss or gradient norm is not finite: `watch.on_nonfinite`.

    `excluded_steps` are left out for good, `rollbacks` counts the returns to a checkpoint; both are in checkpoints.
    """

    def __init__(self, config: RunConfig, processes: Processes, log: RunLog, resumed_from: CheckpointRecord | None):
        self.policy, self.processes, self.log = config.watch.on_nonfinite, processes, log
        self.excluded_steps = set(resumed_from.excluded_steps if resumed_from else ())
        self.rollbacks = resumed_from.rollbacks if resumed_from else 0

    @property
    def rolls_back(self) -> bool:
        return self.policy == "rollback"

    def exclude(self, stage: Stage, batch: StepBatch, result: StepResult) -> dict[str, Any]:
        """Exclude a step that has not changed the weights; return what is known of it, for the log.

        Called by all ranks together. Raises NonFiniteError where the policy is to stop, after `MAX_SKIPS` such steps
        in a row, and at the `MAX_ROLLBACKS`-th rollback.
        """
        losses = self.processes.gather(result.loss.item())
        ids = self.processes.gather(batch.ids.tolist())
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        what = "the gradient norm is not finite"
        if bad:
            what = f"the loss of rank {_joined(bad)} is {losses[bad[0]]}"
        images = [i for rank, part in enumerate(ids) if rank in bad or not bad for i in part]
        text = (
            f"step {batch.step} (stage {stage.index}, patch side {stage.patch_side}): {what}; "
            f"sample ids: {_joined(images)}"
        )
        skips = self._excluded_before(batch.step)
        self.rollbacks += self.rolls_back
        facts = {"stage": stage.index, "losses": list(map(str, losses)), "ranks": bad, "sample_ids": images}
        self.log.write("nonfinite", batch.step, **facts)
        if self.policy == "stop":
            raise NonFiniteError(f"{text}; to exclude such steps: watch.on_nonfinite=skip")
        if self.rollbacks >= MAX_ROLLBACKS:
            raise NonFiniteError(f"{text}; rollback {self.rollbacks} of {MAX_ROLLBACKS}")
        if skips >= MAX_SKIPS:
            raise NonFiniteError(f"{text}; so were the {skips} steps before it")
        self.excluded_steps.add(batch.step)
        logger.warning(f"{text}; the run excludes this step ({self.policy})")
        return facts

    def _excluded_before(self, step: int) -> int:
        """Count the excluded steps right before this one."""
        return next(n for n in range(step + 1) if step - 1 - n not in self.excluded_steps)


def _joined(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
