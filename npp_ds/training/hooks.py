"""Results of steps in progress, and the hooks that the training loop calls around steps.

The host does not wait for the device. After every step all ranks begin one small all-reduce (loss, stop request, lost
lease, written checkpoint). The host reads it while the next step is computed, or at once where a hook is due.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event

import torch
import torch.distributed as dist
from torch import Tensor

from npp_ds.checkpoint.saver import CheckpointSaver
from npp_ds.config.schedule import Stage
from npp_ds.data.loader import StepBatch
from npp_ds.distributed.process_group import Processes
from npp_ds.training.engine import StepResult, TrainingEngine
from npp_ds.training.lease import Lease
from npp_ds.training.preemption import StopRequests


@dataclass(frozen=True)
class FinishedStep:
    """A step of the schedule whose result all ranks know.

    `result` is None when the step did not change the weights. `loss` is the mean of all ranks in nats per code,
    `data_wait` the seconds that this rank has waited for data so far. `checkpoint_is_written` says that all ranks have
    written their part of the checkpoint that is being saved.
    """

    stage: Stage
    batch: StepBatch
    result: StepResult | None
    loss: float
    data_wait: float
    checkpoint_is_written: bool

    @property
    def done(self) -> int:
        """The number of steps that are done with this one."""
        return self.batch.step + 1


@dataclass(frozen=True)
class _PendingStep:
    stage: Stage
    batch: StepBatch
    result: StepResult | None
    data_wait: float
    exchange: "_PendingSum"


class StepResults:
    """A queue of the steps in progress, alike on all ranks. `lease` is None on all ranks but the first.

    `must_stop` becomes True once a rank was asked to stop and all have learnt of it.
    """

    def __init__(self, processes: Processes, stop: StopRequests, lease: Lease | None, saver: CheckpointSaver):
        self.processes, self.stop, self.lease, self.saver = processes, stop, lease, saver
        self.must_stop = False
        self._pending: deque[_PendingStep] = deque()

    def add(self, stage: Stage, batch: StepBatch, result: StepResult | None, data_wait: float) -> None:
        """Add a step that the device was given; `result` is None when it does not change the weights."""
        self._pending.append(_PendingStep(stage, batch, result, data_wait, self._begin_exchange(result)))

    def take(self, leave: int = 0) -> Iterator[FinishedStep]:
        """Yield all steps but the last `leave`, in order; all of them once a rank says to stop.

        Raises UserError on all ranks when another start has taken over the run folder.
        """
        while len(self._pending) > (0 if self.must_stop else leave):
            step = self._pending.popleft()
            loss, written = self._agree(step.exchange)
            yield FinishedStep(step.stage, step.batch, step.result, loss, step.data_wait, written)

    def agree_to_stop(self) -> bool:
        """Return whether any rank was asked to stop, alike on all ranks. Called between steps by all of them."""
        self._agree(self._begin_exchange(None))
        return self.must_stop

    def _begin_exchange(self, result: StepResult | None) -> "_PendingSum":
        loss = result.loss.float().view(1) if result else torch.zeros(1, device=self.processes.device)
        lost = self.lease is not None and self.lease.lost
        written = self.saver.writing is not None and self.saver.writing.done()
        flags = torch.tensor([self.stop.requested is not None, lost, written], dtype=torch.float32)
        if loss.is_cuda:
            flags = flags.pin_memory().to(loss.device, non_blocking=True)
        return _PendingSum(torch.cat([loss, flags]))

    def _agree(self, exchange: "_PendingSum") -> tuple[float, bool]:
        """Return (mean loss, whether the checkpoint in progress is written on all ranks)."""
        total, stopping, lost, written = exchange.read()
        if lost:
            self.processes.on_first(self._check_lease)
        self.must_stop |= stopping > 0
        return total / self.processes.world_size, written == self.processes.world_size

    def _check_lease(self) -> None:
        assert self.lease is not None  # called on the first rank
        self.lease.check()


class _PendingSum:
    """An all-reduce in progress. Neither starting it nor copying its result to the host delays host or device."""

    def __init__(self, values: Tensor):
        self._work = dist.all_reduce(values, async_op=True)
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._work.wait()  # lets the device's stream wait, not the host
            self._values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait for the sums and return them."""
        self._arrived.synchronize() if self._arrived else self._work.wait()
        return self._values.tolist()


Logged = frozenset[tuple[str, int | None]]
"""Events that the log of an earlier start holds for a step: (event, patch side)."""


class StopAgreed(Exception):
    """All ranks have agreed to stop in the middle of a validation or an evaluation."""


@dataclass(frozen=True)
class Context:
    """The state between two steps: `done` steps are done, the last of them in `stage`.

    `already_logged` is empty except at the start of a resumed run.
    """

    engine: TrainingEngine
    results: StepResults
    progress: Event
    stage: Stage
    done: int
    already_logged: Logged = frozenset()

    def check_stop(self) -> None:
        """Report progress to the watchdog. Raises StopAgreed on all ranks when one of them was asked to stop.

        Called by all ranks together, before each batch of work that takes seconds.
        """
        self.progress.set()
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
