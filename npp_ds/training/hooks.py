"""Hooks of the training loop: what is done around optimizer steps. Each hook knows its own interval."""

from collections.abc import Sequence
from dataclasses import dataclass

from npp_ds.config.schedule import Stage
from npp_ds.training.engine import TrainingEngine
from npp_ds.training.step_results import FinishedStep, StepResults
from npp_ds.training.watchdog import Watchdog

Logged = frozenset[tuple[str, int | None]]
"""Events that the log of an earlier start holds for a step: (event, patch side)."""


class StopAgreed(Exception):
    """All ranks have agreed to stop in the middle of a validation or an evaluation."""


@dataclass(frozen=True)
class Context:
    """The state between two steps: `done` steps are done, the last of them in `stage`.

    `already_logged` is empty but at the start of a resumed run.
    """

    engine: TrainingEngine
    results: StepResults
    watchdog: Watchdog
    stage: Stage
    done: int
    already_logged: Logged = frozenset()

    def check_stop(self) -> None:
        """Report progress to the watchdog. Raises StopAgreed on all ranks when one of them was asked to stop.

        Called by all ranks together, before each batch of work that takes seconds.
        """
        self.watchdog.beat()
        if self.results.agree_to_stop():
            raise StopAgreed


class Hook:
    """What the trainer calls around steps, hook by hook in the order of its list, on all ranks alike."""

    def is_due(self, stage: Stage, done: int) -> bool:
        """Return whether `run` has something to do after `done` steps; the host then waits for the device."""
        return False

    def after_step(self, step: FinishedStep) -> None:
        """Take note of a step. When nothing is due after it, this comes while the next one is computed."""

    def run(self, context: Context) -> None:
        """Do what is due after `context.done` steps, while no step is in progress."""


def next_due(hooks: Sequence[Hook], stage: Stage, done: int) -> int:
    """Return how many steps are done, above `done`, when a hook is due next; at most the stage's end."""
    steps = range(done + 1, stage.end_step)
    return next((n for n in steps if any(hook.is_due(stage, n) for hook in hooks)), stage.end_step)
