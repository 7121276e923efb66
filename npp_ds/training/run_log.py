"""What a run tells: its events in metrics.jsonl, the images of every step when asked for, progress on the screen.

All ranks call the same methods; the first one writes.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import StepBatch
from npp_ds.distributed.process_group import Processes
from npp_ds.training.communication import CommunicationWatch
from npp_ds.training.engine import StepResult
from npp_ds.training.evaluation import EVALUATION, PUT_OFF, Result
from npp_ds.training.events import Event, of_kind
from npp_ds.training.metrics import MetricsLog, Progress, StepLog
from npp_ds.training.throughput import Clock, peak_tflops, speed, take_peak_memory_gb

MonitorEvents = list[tuple[str, float, int]]

NOT_FOR_MONITORS = ("stage", "epoch", "elapsed_seconds")
"""Figures of a training line that are no curves."""


class RunLog:
    """The log of one start of a run; `clock` counts its seconds of training, `communication` those of waiting."""

    def __init__(self, config: RunConfig, processes: Processes):
        self.config, self.processes = config, processes
        self.communication = CommunicationWatch(processes.device)
        self.clock = Clock(0.0, self.communication)
        self._peak_tflops = peak_tflops(processes.device)
        self._resources = ExitStack()
        self._metrics: MetricsLog | None = None
        self._samples: StepLog | None = None
        self._progress: Progress | None = None
        self._to_monitors: Callable[[MonitorEvents], None] = lambda events: None

    def open(self, step: int) -> None:
        """Opens the files of the run folder and forgets what they say of later steps; the first rank only."""
        self._metrics = MetricsLog(self.config.directory / "metrics.jsonl", step)
        self.clock = Clock(self._metrics.elapsed_before, self.communication)
        if self.config.logging.samples:
            self._samples = StepLog(self.config.directory / "sample_log.jsonl", step)

    def close(self) -> None:
        self._resources.close()
        for part in (self._metrics, self._samples, self._progress):
            if part:
                part.close()

    def kept_after(self, done: int) -> set[tuple[str, int | None]]:
        """(event, patch side) of what earlier starts have told after `done` steps; empty but on the first rank."""
        kept = self._metrics.kept if self._metrics else []
        return {(e["event"], e.get("patch_side")) for e in kept if e["step"] == done}

    def last_kept(self, event: str) -> Event | None:
        """The last such line of earlier starts, on the first rank."""
        return next(reversed(of_kind(self._metrics.kept if self._metrics else [], event)), None)

    def begin(self, schedule: Schedule, first_step: int, to_monitors: Callable[[MonitorEvents], None]) -> None:
        """Shows progress and starts clock and watch; `to_monitors` passes (name, value, step) on.

        The engine has been made.
        """
        self._to_monitors = to_monitors
        self._resources.enter_context(self.communication.installed())
        self.clock = Clock(self._metrics.elapsed_before if self._metrics else 0.0, self.communication)
        if self.processes.is_first:
            self._progress = Progress(schedule.total_steps, first_step, len(schedule.stages))

    def rewind(self, step: int) -> None:
        """Forgets what was written after `step` steps."""
        for log in (self._metrics, self._samples):
            if log:
                log.rewind(step)

    def write(self, event: str, step: int, **values: Any) -> None:
        if self._metrics:
            self._metrics.write(event, step, **values)

    def say(self, text: str) -> None:
        """A line on the first rank's screen; a screen that takes none (a full disk behind it) is no reason to stop."""
        if self.processes.is_first:
            with suppress(OSError):
                self._progress.say(text) if self._progress else print(text, flush=True)

    def sync(self) -> None:
        """Makes what is written survive a power cut."""
        for log in (self._metrics, self._samples):
            if log:
                log.sync()

    def end(self, step: int) -> None:
        """The run is at its last step."""
        self.write("end", step, elapsed_seconds=self.clock.elapsed)

    def enter(self, stage: Stage) -> None:
        shape = {k: v for k, v in asdict(stage).items() if k not in ("index", "start_step")}
        self.write("stage", stage.start_step, stage=stage.index, elapsed_seconds=self.clock.elapsed, **shape)

    def is_due(self, stage: Stage, done: int) -> bool:
        """Whether there is a line to write after `done` steps, in `stage`."""
        return done in (1, stage.end_step) or done % self.config.logging.every == 0

    def step(self, stage: Stage, batch: StepBatch, result: StepResult, loss: float, waited: float) -> None:
        """A step that changed the weights; `loss` is all ranks' mean, `waited` the seconds spent on data so far."""
        done = batch.step + 1
        self._log_samples(stage, batch)
        self.clock.count(stage.batch_size)
        if not self.is_due(stage, done):
            return
        lap = self.clock.lap(waited)
        rates = speed(lap, stage, self.config.model, self.processes.world_size, self._peak_tflops)
        own = [lap.communication_wait_share, take_peak_memory_gb(self.processes.device)]
        largest_wait_share, largest_memory = self.communication.call(self.processes.largest, own)
        line = {
            "stage": stage.index,
            "patch_side": stage.patch_side,
            "epoch": batch.epoch,
            "loss": loss,
            "learning_rate": stage.learning_rate(batch.step),
            "grad_norm": result.grad_norm.item(),
            **rates,
            "elapsed_seconds": self.clock.elapsed,
            "data_wait_share": lap.data_wait_share,
            "communication_wait_share": lap.communication_wait_share,
            "communication_wait_share_largest": largest_wait_share,
            "peak_memory_gb": largest_memory,
        }
        self.write("train", done, **line)
        if self._progress:
            with suppress(OSError):
                self._progress.show({"step": done, **line}, lap.seconds_per_step)
        curves = {name: value for name, value in line.items() if name not in NOT_FOR_MONITORS and value is not None}
        self._to_monitors([(f"train/{name}", value, done) for name, value in curves.items()])

    def left_out(self, stage: Stage, batch: StepBatch) -> None:
        """A step of the schedule that does not change the weights."""
        self._log_samples(stage, batch, left_out=True)
        self.write("left_out", batch.step + 1, stage=stage.index, patch_side=stage.patch_side)

    def validation(self, event: str, stage: Stage, done: int, patch_side: int, nll: float) -> None:
        self.write(event, done, stage=stage.index, patch_side=patch_side, nll=nll)
        self.say(f"{event.replace('_', ' of ')} after step {done}: {nll:.4f} nats per code at side {patch_side}")
        self._to_monitors([(f"{event}/nll_side_{patch_side}", nll, done)])

    def evaluation(self, stage: Stage, done: int, found: Result | None) -> None:
        """Samples of the weights after `done` steps have been compared with real images, or None: put off."""
        place = {"stage": stage.index, "patch_side": stage.patch_side, "elapsed_seconds": self.clock.elapsed}
        if found is None:
            self.write(PUT_OFF, done, **place)
            most = self.config.evaluate.max_share
            why = f"the last one took more than {most:.1%} of the training time since (evaluate.max_share)"
            self.say(f"evaluation after step {done} put off: {why}")
            return
        self.write(EVALUATION, done, **place, **found._asdict())
        self.say(
            f"evaluation after step {done}: Frechet distance {found.frechet_distance:.4g} of {found.images} images at "
            f"side {stage.patch_side}; {found.seconds:.1f} s, {found.share_of_time:.1%} of the training time before it"
        )
        self._to_monitors([(f"{EVALUATION}/frechet_distance_side_{stage.patch_side}", found.frechet_distance, done)])

    def _log_samples(self, stage: Stage, batch: StepBatch, left_out: bool = False) -> None:
        """The images of the global batch in training order, the same for any number of processes."""
        if not self.config.logging.samples:
            return
        shape = (-1, 1, stage.micro_batch_size)
        parts = self.processes.gather([values.reshape(shape) for values in (batch.ids, batch.crops)])
        if self._samples:
            ids, crops = (np.concatenate(of_ranks, axis=1).ravel().tolist() for of_ranks in zip(*parts, strict=True))
            place = {"stage": stage.index, "epoch": batch.epoch, "patch_side": stage.patch_side}
            self._samples.write("samples", batch.step + 1, **place, left_out=left_out, ids=ids, crops=crops)
