"""The checkpoints of a run: when they are saved, what they record, and what follows if one cannot be written."""

import logging
from pathlib import Path

from npp_ds.checkpoint import folders
from npp_ds.checkpoint.folders import CheckpointRecord
from npp_ds.checkpoint.saver import CheckpointSaver, SaveFailed
from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.training.deepspeed_config import zero_stage_of
from npp_ds.training.engine import TrainingEngine
from npp_ds.training.hooks import Context, Hook
from npp_ds.training.loss_checks import NonFinitePolicy
from npp_ds.training.run_log import RunLog

logger = logging.getLogger(__name__)


class Checkpointing(Hook):
    """Save at the end of every stage and every `checkpoint.every` steps, and remove old checkpoints.

    `last_saved` is the step of the newest checkpoint that this run knows to be complete.
    """

    def __init__(
        self,
        config: RunConfig,
        schedule: Schedule,
        processes: Processes,
        log: RunLog,
        saver: CheckpointSaver,
        nonfinite: NonFinitePolicy,
        data_fingerprint: str,
        resumed_from: CheckpointRecord | None,
    ):
        self.config, self.schedule, self.processes, self.log = config, schedule, processes, log
        self.saver, self.nonfinite, self.data_fingerprint = saver, nonfinite, data_fingerprint
        self.zero_stage = zero_stage_of(config)  # once: the settings file may change or go while the run trains
        self.last_saved = resumed_from.step if resumed_from else None

    def is_due(self, stage: Stage, done: int) -> bool:
        every = self.config.checkpoint.every
        return done == stage.end_step or (every > 0 and done % every == 0)

    def run(self, context: Context) -> None:
        must = context.done == self.schedule.total_steps
        self.save(context.engine, context.stage, context.done, must)

    def save(self, engine: TrainingEngine, stage: Stage, done: int, must: bool = False) -> None:
        """Begin a checkpoint after finishing one that is still being written; with `must` it is complete on return.

        Called by all ranks together. Without `must` a checkpoint that cannot be written is reported and left out; with
        it that raises UserError on all ranks.
        """
        with self.log.clock.paused():
            self.settle()
            partitions, state = engine.partitions, engine.state()
            record = CheckpointRecord(
                step=done,
                stage=stage.index,
                world_size=self.processes.world_size,
                zero_stage=self.zero_stage,
                precision=self.config.precision,
                config_hash=self.config.hash(),
                config=self.config.fixed_keys(),
                data_fingerprint=self.data_fingerprint,
                optimizer_steps=partitions.optimizer_steps,
                kinds=list(state),
                shapes={name: list(shape) for name, shape in partitions.shapes.items()},
                excluded_steps=sorted(self.nonfinite.excluded_steps),
                rollbacks=self.nonfinite.rollbacks,
            )
            try:
                self.saver.begin(record, partitions.fragments, state)
            except SaveFailed as error:
                self._report_failure(done, error, must)
            if must or not self.config.checkpoint.asynchronous:
                self.settle(must)

    def settle(self, must: bool = False) -> None:
        """Finish the checkpoint that is being written, if there is one. Called by all ranks together."""
        if self.saver.pending is None:
            return
        step = self.saver.pending.step
        self.log.sync()  # a checkpoint never exists without the log lines of its steps
        try:
            with self.log.clock.paused():
                saved = self.saver.finish()
        except SaveFailed as error:
            self._report_failure(step, error, must)
            return
        self.last_saved = step
        self.log.write("checkpoint", step, seconds=saved.seconds_waited, bytes=saved.bytes)
        if self.processes.is_first:
            keep = self.config.checkpoint
            stage_ends = {stage.end_step for stage in self.schedule.stages}
            old = self.saver.checkpoints, step, keep.keep_last, keep.keep_every, stage_ends
            self.saver.afterwards(folders.remove_old, *old)

    def newest(self) -> tuple[Path, CheckpointRecord]:
        """Return the newest complete checkpoint and its record; on the first rank. Raises UserError without one."""
        folder = folders.newest_complete(self.saver.checkpoints)
        if folder is None:
            raise UserError(f"{self.saver.checkpoints}: no complete checkpoint to roll back to")
        return folder, folders.read_record(folder)

    def _report_failure(self, step: int, error: SaveFailed, must: bool) -> None:
        saved = self.processes.on_first(folders.saved_steps, self.saver.checkpoints)
        last = f"the last one is that of step {saved[0]}" if saved else "there is none yet"
        text = f"the checkpoint of step {step} could not be written: {error}; {last}; free space or repair the disk"
        self.log.write("save_failed", step, problem=str(error))
        if must:
            raise UserError(f"{text}, then start again", on_all_ranks=True)
        logger.warning(f"{text}; the run continues")
