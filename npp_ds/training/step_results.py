"""What comes of the steps that the device has been given: agreed on by all ranks, told, and acted on.

The host does not wait for the device. After every step all ranks begin a small exchange, and read it when the next step
is under way, or at once where something is to be done after the step.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import StepBatch
from npp_ds.distributed.process_group import PendingSum, Processes
from npp_ds.training.engine import StepResult
from npp_ds.training.loss_spikes import Spike, SpikeRule
from npp_ds.training.run_log import RunLog


@dataclass(frozen=True)
class Signals:
    """What one rank knows and all must act on: it is asked to stop, has lost the run folder, has written its part."""

    stop: bool
    lost: bool
    written: bool


@dataclass(frozen=True)
class _Step:
    """A step that the device has been given; `result` is None when it is left out, `waited` the data wait so far."""

    stage: Stage
    batch: StepBatch
    result: StepResult | None
    waited: float
    exchange: PendingSum


class Outcomes:
    """The steps under way on this rank, the same ones on all; `signals()` is asked after each.

    `on_lost` is called on all ranks when one has lost the run folder, and raises; `on_written` when the checkpoint that
    was being written meanwhile is on all disks.
    """

    def __init__(
        self,
        config: RunConfig,
        processes: Processes,
        log: RunLog,
        signals: Callable[[], Signals],
        on_lost: Callable[[], None],
        on_written: Callable[[], None],
    ):
        self.config, self.processes, self.log = config, processes, log
        self.signals, self.on_lost, self.on_written = signals, on_lost, on_written
        self._under_way: deque[_Step] = deque()
        self.forget()

    def forget(self) -> None:
        """What was observed so far is of weights that are no more."""
        self._spikes = SpikeRule(self.config.watch.spike_window, self.config.watch.spike_threshold)

    def begin(self, stage: Stage, batch: StepBatch, result: StepResult | None, waited: float) -> None:
        """Takes on a step; `result` is None when it does not change the weights, `waited` the data wait so far."""
        self._under_way.append(_Step(stage, batch, result, waited, self._begin_exchange(result)))

    def read(self, leave: int = 0) -> bool:
        """Tells of all steps under way but the last `leave`; of all, when one says to stop. Returns whether to stop."""
        must_stop = False
        while len(self._under_way) > (0 if must_stop else leave):
            step = self._under_way.popleft()
            loss, asked = self._agreed(step.exchange)
            must_stop |= asked
            self._tell(step, loss)
        return must_stop

    def must_stop(self) -> bool:
        """Whether a rank is asked to stop, alike on all ranks; between steps."""
        return self._agreed(self._begin_exchange(None))[1]

    def _begin_exchange(self, result: StepResult | None) -> PendingSum:
        loss = result.loss.float().view(1) if result else torch.zeros(1, device=self.processes.device)
        signals = self.signals()
        flags = torch.tensor([signals.stop, signals.lost, signals.written], dtype=torch.float32)
        if loss.is_cuda:
            flags = flags.pin_memory().to(loss.device, non_blocking=True)
        return self.log.communication.call(self.processes.begin_sum, torch.cat([loss, flags]))

    def _agreed(self, exchange: PendingSum) -> tuple[float, bool]:
        """(mean loss, whether to stop), alike on all ranks."""
        total, stopping, lost, written = self.log.communication.call(exchange.read)
        if lost:
            self.on_lost()
        if written == self.processes.world_size:
            self.on_written()
        return total / self.processes.world_size, stopping > 0

    def _tell(self, step: _Step, loss: float) -> None:
        if step.result is None:
            self.log.left_out(step.stage, step.batch)
            return
        self._check_loss(step.batch.step, loss)
        self.log.step(step.stage, step.batch, step.result, loss, step.waited)
        if spike := self._spikes.observe(step.stage.index, loss):
            self._warn_of_spike(step, spike)

    def _check_loss(self, step: int, loss: float) -> None:
        expected = math.log(self.config.model.vocab_size)
        if step == 0 and not self.config.init_from and abs(loss - expected) > 1e-3:
            raise RuntimeError(
                f"the first loss of a fresh run is {loss:.5f}, not ln(vocab_size) = {expected:.5f}: its output head "
                "starts at zero, so either the weights are not fresh or codes and loss do not fit; nothing was saved"
            )

    def _warn_of_spike(self, step: _Step, spike: Spike) -> None:
        ids = [i for part in self.processes.gather(step.batch.ids.tolist()) for i in part]
        number, stage = step.batch.step, step.stage.index
        self.log.write("spike", number + 1, stage=stage, **asdict(spike), sample_ids=ids)
        self.log.say(
            f"WARNING: step {number} (stage {stage}): loss {spike.loss:.4f} is a spike, the mean of the last "
            f"ones is {spike.mean:.4f} (standard deviation {spike.std:.4f}); sample ids: {', '.join(map(str, ids))}"
        )
