"""The log of a run: its events in metrics.jsonl, the images of every step when asked for, monitors, the screen.

All ranks call the same methods; the first one writes.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import StepBatch
from npp_ds.distributed.process_group import Processes
from npp_ds.training.deepspeed_config import zero_stage_of
from npp_ds.training.engine import TrainingEngine
from npp_ds.training.hooks import FinishedStep, Hook, Logged
from npp_ds.training.metrics import Event, MetricsLog, StepLog, events_named
from npp_ds.training.throughput import Clock, StepCosts, peak_tflops, speed, take_peak_memory_gb
from npp_ds.utils.format import counted
from npp_ds.utils.screen import LiveLine, fitted

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

NOT_FOR_MONITORS = ("epoch", "elapsed_seconds", "stage_eta_seconds", "eta_seconds")
"""Figures of a training line that are no curves."""


class RunLog(Hook):
    """The log of one start of a run; `clock` counts its seconds of training."""

    def __init__(self, config: RunConfig, processes: Processes):
        self.config, self.processes = config, processes
        self.clock = Clock(0.0)
        self._peak_tflops = peak_tflops(processes.device)
        self._metrics: MetricsLog | None = None
        self._samples: StepLog | None = None
        self._progress: Progress | None = None
        self._monitors: Monitors | None = None

    def open(self, step: int) -> None:
        """Open the files of the run folder and drop their lines of later steps; the first rank only."""
        self._metrics = MetricsLog(self.config.directory / "metrics.jsonl", step)
        self.clock = Clock(self._metrics.elapsed_before)
        if self.config.logging.samples:
            self._samples = StepLog(self.config.directory / "sample_log.jsonl", step)

    def close(self) -> None:
        for part in (self._metrics, self._samples, self._progress):
            if part:
                part.close()

    def already_logged(self, done: int) -> Logged:
        """Return (event, patch side) of what earlier starts logged after `done` steps; empty but on the first rank."""
        return frozenset((e["event"], e.get("patch_side")) for e in self._kept if e["step"] == done)

    def last_logged(self, event: str) -> Event | None:
        """Return the last such line of earlier starts, on the first rank."""
        return next(reversed(events_named(self._kept, event)), None)

    @property
    def _kept(self) -> list[Event]:
        """The lines of earlier starts, on the first rank."""
        return self._metrics.kept if self._metrics else []

    def start(self, schedule: Schedule, first_step: int, engine: TrainingEngine, how: str) -> None:
        """Say what starts and `how`, show progress, start the clock; the monitors of `engine` get the curves."""
        config, stages = (
            self.config,
            (
                f"side {s.patch_side}: {s.steps} steps of {s.batch_size} images ({s.micro_batch_size} at a time)"
                for s in schedule.stages
            ),
        )
        logger.info(
            f"{config.name}: {how} in {config.directory}; {config.model.parameters() / 1e6:.1f}M parameters, "
            f"{counted(self.processes.world_size, 'process')}, ZeRO-{zero_stage_of(config)}, {config.precision}; "
            + ", ".join(stages)
        )
        self.clock = Clock(self._metrics.elapsed_before if self._metrics else 0.0)
        self._costs = StepCosts(schedule.stages, config.model, events_named(self._kept, "train"))
        if self.processes.is_first:
            self._monitors = Monitors(config, engine.monitor, first_step)
            self._progress = Progress(schedule.total_steps, len(schedule.stages))

    def rewind(self, step: int) -> None:
        """Drop what was written after `step` steps."""
        for log in (self._metrics, self._samples):
            if log:
                log.rewind(step)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Write a line to metrics.jsonl: what happened after `step` steps."""
        if self._metrics:
            self._metrics.write(event, step, **values)

    def curves(self, step: int, values: Mapping[str, float | None]) -> None:
        """Send a point of each named curve to the monitors; None is left out."""
        if self._monitors:
            self._monitors.curves(step, {name: value for name, value in values.items() if value is not None})

    def picture(self, name: str, step: int, image: "Image") -> None:
        """Send a picture to the monitors that show pictures."""
        if self._monitors:
            self._monitors.picture(name, step, image)

    def sync(self) -> None:
        """Make what is written survive a power cut."""
        for log in (self._metrics, self._samples):
            if log:
                log.sync()

    def end(self, step: int) -> None:
        """Log that the run has reached its last step."""
        self.write("end", step, elapsed_seconds=self.clock.elapsed)

    def begin_stage(self, stage: Stage) -> None:
        shape = {k: v for k, v in asdict(stage).items() if k not in ("index", "start_step")}
        self.write("stage", stage.start_step, stage=stage.index, elapsed_seconds=self.clock.elapsed, **shape)
        if self._monitors:
            self._monitors.stage(stage)

    def is_due(self, stage: Stage, done: int) -> bool:
        return done in (1, stage.end_step) or done % self.config.logging.every == 0

    def after_step(self, step: FinishedStep) -> None:
        stage, batch, result = step.stage, step.batch, step.result
        if self.config.logging.samples:
            self._log_samples(stage, batch, left_out=result is None)
        if result is None:
            self.write("left_out", step.done, stage=stage.index, patch_side=stage.patch_side)
            if step.done == stage.end_step:
                self.clock.lap(step.data_wait)  # the rates of the next stage begin with it
            return
        self.clock.steps += 1
        self.clock.images += stage.batch_size
        if not self.is_due(stage, step.done):
            return
        lap = self.clock.lap(step.data_wait)
        (peak_memory,) = self.processes.largest([take_peak_memory_gb(self.processes.device)])
        line = {
            "stage": stage.index,
            "patch_side": stage.patch_side,
            "epoch": batch.epoch,
            "loss": step.loss,
            "learning_rate": stage.learning_rate(batch.step),
            "grad_norm": result.grad_norm.item(),
            **speed(lap, stage, self.config.model, self.processes.world_size, self._peak_tflops),
            "elapsed_seconds": self.clock.elapsed,
            "data_wait_share": lap.data_wait_share,
            "peak_memory_gb": peak_memory,
        }
        self._costs.add(line)
        left = self._costs.left(step.done)
        line |= {"stage_eta_seconds": left[stage.index], "eta_seconds": sum(left)}
        self.write("train", step.done, **line)
        if self._progress:
            self._progress.show({"step": step.done, "eta_at_most": self._costs.left_at_most(step.done), **line})
        self.curves(step.done, {f"train/{name}": v for name, v in line.items() if name not in NOT_FOR_MONITORS})

    def _log_samples(self, stage: Stage, batch: StepBatch, left_out: bool) -> None:
        """Write the images of the global batch in training order, the same for any number of processes."""
        shape = (-1, 1, stage.micro_batch_size)
        parts: Sequence[list[np.ndarray]] = self.processes.gather(
            [values.reshape(shape) for values in (batch.ids, batch.crops)]
        )
        if self._samples:
            ids, crops = (np.concatenate(of_ranks, axis=1).ravel().tolist() for of_ranks in zip(*parts, strict=True))
            where = {"stage": stage.index, "epoch": batch.epoch, "patch_side": stage.patch_side}
            self._samples.write("samples", batch.step + 1, **where, left_out=left_out, ids=ids, crops=crops)


class Progress:
    """Stage, step, loss, learning rate, images/s, MFU and the time left, on the first rank's screen.

    One line per logged step; on a terminal what fits its width, above a bar with the time left. A screen behind a full
    disk is no reason to stop.
    """

    def __init__(self, total_steps: int, stages: int):
        self.total_steps, self.stages = total_steps, stages
        self._live = LiveLine() if sys.stdout.isatty() else None

    def show(self, line: Event) -> None:
        """Show the state after a logged step: a line of metrics.jsonl, and whether its ETA is an upper bound."""
        facts = [
            (3, f"stage {line['stage'] + 1}/{self.stages} side {line['patch_side']}"),
            (2, f"step {line['step']}/{self.total_steps}"),
            (1, f"loss {line['loss']:.4f}"),
            (7, f"lr {line['learning_rate']:.2e}"),
            (5, f"{line['images_per_second']:.0f} images/s"),
        ]
        if line["mfu"] is not None:
            facts.append((6, f"MFU {line['mfu']:.1%}"))
        eta = [(0, f"eta {'<' if line['eta_at_most'] else ''}{_clock(line['eta_seconds'])}")]
        if line["stage"] + 1 < self.stages:
            eta.insert(0, (4, f"stage eta {_clock(line['stage_eta_seconds'])}"))
        with suppress(OSError):
            if self._live:
                print(fitted(facts, self._live.width), flush=True)
                self._live.show(line["step"] / self.total_steps, facts + eta)
            else:
                print(fitted(facts + eta), flush=True)

    def close(self) -> None:
        if self._live:
            self._live.close()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Monitors:
    """TensorBoard, Weights & Biases and CSV files through DeepSpeed's monitors (0.19.8), as a config asks for them.

    They belong to the first rank, and get no more after an error. `monitor` is the engine's `MonitorMaster`, None
    without monitors. The config is sent at once.
    """

    def __init__(self, config: RunConfig, monitor: Any, step: int):
        self._monitor = monitor
        self._send(lambda: self._begin(config, step))

    def _begin(self, config: RunConfig, step: int) -> None:
        if writer := self._tensorboard:
            writer.add_text("config", "".join(f"    {line}\n" for line in config.to_yaml().splitlines()), step)
        if self._monitor.wandb_monitor:
            import wandb

            wandb.config.update(config.model_dump(mode="json"), allow_val_change=True)

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        """Send a point of each named curve."""
        self._send(lambda: self._monitor.write_events([(name, value, step) for name, value in values.items()]))

    def stage(self, stage: Stage) -> None:
        """Mark the begin of a stage."""
        shape = {name: getattr(stage, name) for name in ("patch_side", "batch_size", "peak_learning_rate", "end_step")}
        text = f"stage {stage.index}: " + ", ".join(f"{name} {value}" for name, value in shape.items())
        self._send(lambda: self._tensorboard and self._tensorboard.add_text("stage", text, stage.start_step))
        self.curves(stage.start_step, {"stage/index": stage.index, **{f"stage/{k}": v for k, v in shape.items()}})

    def picture(self, name: str, step: int, image: "Image") -> None:
        """Send a picture to those that show pictures."""
        self._send(lambda: self._show(name, step, np.asarray(image)))

    def _show(self, name: str, step: int, image: np.ndarray) -> None:
        if writer := self._tensorboard:
            writer.add_image(name, image, step, dataformats="HWC")
            writer.flush()
        if self._monitor.wandb_monitor:
            import wandb

            self._monitor.wandb_monitor.log({name: wandb.Image(image)}, step=step)

    @property
    def _tensorboard(self) -> Any:
        return self._monitor.tb_monitor and self._monitor.tb_monitor.summary_writer

    def _send(self, action: Callable[[], object]) -> None:
        if self._monitor:
            try:
                action()
            except Exception as error:  # whatever a monitor's library raises is no reason to lose a run
                self._monitor = None
                logger.warning(f"logging.monitors: given up after {error!r}")
