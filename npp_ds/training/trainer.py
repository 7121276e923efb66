"""A training run from top to bottom: data, schedule, engine, resume, the loop over steps, what is done after each."""

import math
from collections.abc import Set
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from npp_ds.checkpoint import folders
from npp_ds.checkpoint.folders import CheckpointRecord
from npp_ds.checkpoint.open import Weights
from npp_ds.checkpoint.saver import CheckpointSaver, SaveFailed
from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import StepBatch
from npp_ds.data.store import CodeStore
from npp_ds.data.store import stage as stage_shards
from npp_ds.distributed.process_group import Processes, join_processes, leave_processes
from npp_ds.errors import UserError
from npp_ds.training import run_folder
from npp_ds.training.deepspeed_config import read_settings
from npp_ds.training.engine import StepResult, TrainingEngine
from npp_ds.training.evaluation import EVALUATION, Evaluation
from npp_ds.training.lease import Lease
from npp_ds.training.preemption import Preempted, StopRequests
from npp_ds.training.preflight import fitting_schedule, initial_weights
from npp_ds.training.profiler import StepProfile
from npp_ds.training.run_log import RunLog
from npp_ds.training.stages import StageManager
from npp_ds.training.step_results import Outcomes, Signals
from npp_ds.training.validation import Validation
from npp_ds.training.watchdog import Watchdog

Told = Set[tuple[str, int | None]]  # events and patch sides

MAX_ROLLBACKS = 3
MAX_SKIPS = 10  # in a row


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm of a step is no finite number; the weights are those from before the step."""


def train(config: RunConfig, from_step: int | None, stop: StopRequests) -> None:
    """Trains the run that `config` describes, from its newest complete checkpoint when there is one, to its last step.

    `from_step` asks for the checkpoint of exactly that step; later ones are set aside. `stop` notes signals. Called by
    every process of the launch. Raises UserError for what a person can mend, NonFiniteError when the loss or the
    gradients left the finite numbers, Preempted after a signal has been answered with a checkpoint.
    """
    processes = join_processes()
    try:
        Trainer(config, processes, from_step, stop).run()
    finally:
        leave_processes()


class Trainer:
    """One process's part in a run; all processes do the same steps, the first one also writes."""

    def __init__(
        self,
        config: RunConfig,
        processes: Processes,
        from_step: int | None = None,
        stop: StopRequests | None = None,
    ):
        self.config, self.processes = config, processes
        self.stop = stop or StopRequests()
        self.run_dir = config.directory
        self.checkpoints = self.run_dir / "checkpoints"
        self.log = RunLog(config, processes)
        self.lease: Lease | None = None
        self._resources = ExitStack()
        self._resources.callback(self.log.close)
        try:
            self._set_up(from_step)
        except BaseException:
            self._resources.close()
            raise

    def _set_up(self, from_step: int | None) -> None:
        config, processes = self.config, self.processes
        self.schedule: Schedule = processes.on_first(fitting_schedule, config, processes.world_size)
        self.train_store, self.val_store = processes.on_all(self._stage_data)
        self.zero_stage: int = read_settings(config.deepspeed.config)["zero_optimization"]["stage"]
        token: str = processes.on_first(self._take_run_folder)
        processes.on_all(run_folder.check_shared, self.run_dir, token)
        self.resumed_from: tuple[Path, CheckpointRecord] | None = processes.on_first(
            run_folder.checkpoint_to_resume, config, self.train_store.manifest.fingerprint(), from_step, self.log.say
        )
        processes.on_first(run_folder.describe, config, processes)
        record = self.resumed_from[1] if self.resumed_from else None
        self.first_step = record.step if record else 0
        self.last_saved = record.step if record else None
        self.excluded_steps = set(record.excluded_steps) if record else set()
        self.rollbacks = record.rollbacks if record else 0
        self.initial: Weights | None = None if record else processes.on_first(initial_weights, config)
        # What an earlier start told before it saved anything may be of other weights.
        processes.on_first(self.log.open, -1 if self.initial else self.first_step)
        self.validation = Validation(config, self.schedule, self.val_store, processes)
        self.evaluation = Evaluation(config, self.schedule, self.train_store.manifest.tokenizer, processes)
        self.told: Told = processes.on_first(self.log.kept_after, self.first_step)
        self.is_finished = self.first_step == self.schedule.total_steps and not self._lacks(self.told)
        if self.is_finished:
            return
        self._end_if_asked()
        self.evaluation.load(self.log.last_kept(EVALUATION))
        self.engine = TrainingEngine(config, self.schedule.stages[0], processes)
        self.stages = StageManager(config, self.schedule, self.train_store, self.engine, processes)
        self.profile = StepProfile(config, processes, self.log)
        self.watchdog = Watchdog(self.run_dir / "stalled.txt", processes.rank, config.watch.stall_seconds)
        self.saver = CheckpointSaver(
            self.checkpoints,
            processes,
            token=token,
            may_commit=self._before_commit,
            asynchronous=config.checkpoint.asynchronous,
            beat=self.watchdog.beat,
        )
        self._resources.callback(self.saver.close)
        actions = self._signals, self._end_without_folder, self._settle
        self.outcomes = Outcomes(config, processes, self.log, *actions)

    def run(self) -> None:
        with self._resources:
            if self.is_finished:
                self.log.say(f"{self.run_dir}: already trained to its last step, {self.first_step}; nothing to do")
                self.log.end(self.first_step)
                return
            if self.resumed_from:
                self._load(*self.resumed_from)
            elif self.initial:
                self._start_from(self.initial)
            self._end_if_asked()
            self._announce()
            self.log.begin(self.schedule, self.first_step, self.engine.write_events)
            with self.watchdog:
                self._train()
            self.log.end(self.schedule.total_steps)

    def _train(self) -> None:
        step = self.first_step
        if step == 0 and self.config.watch.on_nonfinite == "rollback" and not self.resumed_from:
            self._save(self.schedule.stages[0], 0)
        if self._lacks(self.told):
            with self.log.clock.paused():
                self._examine(self._stage_before(step), step, self.told)
        while step < self.schedule.total_steps:
            step = self._train_from(step)

    def _train_from(self, first_step: int) -> int:
        """Trains to the last step, or to one that rolls back; returns the step to go on with."""
        self.outcomes.forget()
        with closing(self.profile.around(self.stages.batches(first_step), first_step)) as batches:
            for stage, batch in batches:
                self.watchdog.beat()
                if batch.step == stage.start_step:
                    self.log.enter(stage)
                result = None
                if batch.step not in self.excluded_steps:
                    result = self.engine.step(batch.step, batch.micro_batches, stage.learning_rate(batch.step))
                if result and not result.was_applied:
                    self.outcomes.read()
                    facts = self._answer_nonfinite(stage, batch, result)
                    if self.config.watch.on_nonfinite == "rollback":
                        return self._roll_back(batch.step, facts)
                    result = None
                self.outcomes.begin(stage, batch, result, self.stages.wait_seconds)
                done = batch.step + 1
                is_due = self._is_due(stage, done)
                must_stop = self.outcomes.read(leave=0 if is_due else 1)
                if is_due or must_stop:
                    with self.log.clock.paused():
                        self._after_step(stage, done, must_stop)
        return self.schedule.total_steps

    def _is_due(self, stage: Stage, done: int) -> bool:
        """Whether the outcome of the step that made it `done` is needed before the next one."""
        due = self.log.is_due(stage, done), self._is_save_due(stage, done)
        return any(due) or self.validation.is_due(done) or self.evaluation.is_due(done)

    def _is_save_due(self, stage: Stage, done: int) -> bool:
        return done == stage.end_step or _due(done, self.config.checkpoint.every)

    def _after_step(self, stage: Stage, done: int, must_stop: bool) -> None:
        """Saves, stops, validates and evaluates as is due after `done` steps."""
        if must_stop or self._is_save_due(stage, done):
            self._save(stage, done, must=must_stop or done == self.schedule.total_steps)
        if must_stop:
            self._end_preempted(done)
        self._examine(stage, done)

    def _signals(self) -> Signals:
        lost = self.lease is not None and self.lease.lost
        return Signals(stop=self.stop.requested is not None, lost=lost, written=self.saver.is_written)

    def _end_without_folder(self) -> None:
        """Another start has taken the run folder: raises UserError on all ranks."""
        self.processes.on_first(lambda: self.lease.check())

    def _before_commit(self) -> None:
        """What must hold when a checkpoint appears: the folder is ours, and the logs say how it came about."""
        self.log.sync()
        self.lease.check()

    def _answer_nonfinite(self, stage: Stage, batch: StepBatch, result: StepResult) -> dict[str, Any]:
        """Leaves out for good a step that was not finite and has not changed the weights, or raises NonFiniteError.

        Returns what is known of it.
        """
        losses = self.processes.gather(result.loss.item())
        ids = self.processes.gather(batch.ids.tolist())
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        what = "the gradient norm is not finite"
        if bad:
            what = f"the loss of rank {', '.join(map(str, bad))} is {losses[bad[0]]}"
        images = [i for rank, part in enumerate(ids) if rank in bad or not bad for i in part]
        text = (
            f"step {batch.step} (stage {stage.index}, patch side {stage.patch_side}): {what}; "
            f"sample ids: {', '.join(map(str, images))}"
        )
        policy, skips = self.config.watch.on_nonfinite, self._skips_before(batch.step)
        self.rollbacks += policy == "rollback"
        if policy == "rollback":
            self._settle()
        facts = {"stage": stage.index, "losses": list(map(str, losses)), "ranks": bad, "sample_ids": images}
        self.log.write("nonfinite", batch.step, **facts)
        if policy == "stop" or self.rollbacks == MAX_ROLLBACKS or skips == MAX_SKIPS:
            self._settle()
            hint = {
                "stop": "; to leave such steps out: watch.on_nonfinite=skip",
                "skip": f"; so were the {skips} steps before it",
                "rollback": f"; rollback {self.rollbacks} of {MAX_ROLLBACKS}",
            }
            raise NonFiniteError(text + hint[policy])
        self.excluded_steps.add(batch.step)
        self.log.say(f"WARNING: {text}; the run leaves this step out ({policy})")
        return facts

    def _skips_before(self, step: int) -> int:
        """How many steps right before this one were left out."""
        return next(n for n in range(step + 1) if step - 1 - n not in self.excluded_steps)

    def _roll_back(self, failed_step: int, facts: dict[str, Any]) -> int:
        """Loads the newest complete checkpoint, excluded steps apart; returns the step to go on with."""
        with self.watchdog.patient():
            folder, record = self.processes.on_first(self._checkpoint_to_roll_back_to)
            self._load(folder, record)
            self.processes.on_first(self.log.rewind, record.step)
        self.log.write("rollback", record.step, failed_step=failed_step, rollbacks=self.rollbacks, **facts)
        left_out = ", ".join(map(str, sorted(self.excluded_steps)))
        self.log.say(f"rolled back to {folder.name} (rollback {self.rollbacks}); left out: steps {left_out}")
        return record.step

    def _checkpoint_to_roll_back_to(self) -> tuple[Path, CheckpointRecord]:
        folder = folders.newest_complete(self.checkpoints)
        if folder is None:
            raise UserError(f"{self.checkpoints}: no complete checkpoint to roll back to")
        return folder, folders.read_record(folder)

    def _save(self, stage: Stage, done: int, must: bool = False) -> None:
        """Begins a checkpoint, finishing one that is still being written; with `must` it is complete afterwards."""
        self._settle()
        partitions, state = self.engine.partitions, self.engine.state()
        record = CheckpointRecord(
            step=done,
            stage=stage.index,
            world_size=self.processes.world_size,
            zero_stage=self.zero_stage,
            precision=self.config.precision,
            config_hash=self.config.hash(),
            config=self.config.bound_keys(),
            data_fingerprint=self.train_store.manifest.fingerprint(),
            optimizer_steps=partitions.optimizer_steps,
            kinds=list(state),
            shapes={name: list(shape) for name, shape in partitions.shapes.items()},
            excluded_steps=sorted(self.excluded_steps),
            rollbacks=self.rollbacks,
        )
        try:
            self.saver.begin(record, partitions.fragments, state)
        except SaveFailed as error:
            self._live_without(done, error, must)
        if self.saver.pending and (must or not self.config.checkpoint.asynchronous):
            self._finish_save(must)

    def _settle(self) -> None:
        """Finishes the checkpoint that is being written, if there is one."""
        if self.saver.pending:
            self._finish_save(must=False)

    def _finish_save(self, must: bool) -> None:
        step = self.saver.pending.step
        try:
            saved = self.saver.finish()
        except SaveFailed as error:
            self._live_without(step, error, must)
            return
        self.last_saved = step
        self.log.write("checkpoint", step, seconds=saved.seconds_waited, bytes=saved.bytes)
        if self.processes.is_first:
            keep = self.config.checkpoint.keep_last, self._is_kept
            self.saver.afterwards(folders.remove_old, self.checkpoints, step, *keep)

    def _is_kept(self, step: int) -> bool:
        """Whether a checkpoint stays however old it is."""
        return any(step == s.end_step for s in self.schedule.stages) or _due(step, self.config.checkpoint.keep_every)

    def _live_without(self, step: int, error: SaveFailed, must: bool) -> None:
        """Goes on without the checkpoint of `step`, unless the run ends with it."""
        left = self.processes.on_first(folders.saved_steps, self.checkpoints)
        last = f"the last one is that of step {left[0]}" if left else "there is none yet"
        text = f"the checkpoint of step {step} could not be written: {error}; {last}; make room or mend the disk"
        self.log.write("save_failed", step, problem=str(error))
        if must:
            raise UserError(f"{text}, then start again", on_all_ranks=True)
        self.log.say(f"WARNING: {text}; the run goes on")

    def _end_if_asked(self) -> None:
        """Ends a start that a signal has asked to stop before its first step; there is nothing new to save."""
        if names := list(filter(None, self.processes.gather(self.stop.requested))):
            self.log.say(f"{names[0]}: stopped before the first step of this start; the same command goes on")
            raise Preempted(names[0], self.first_step)

    def _end_preempted(self, done: int) -> None:
        """Ends a run that a signal has asked to stop; its checkpoint of `done` steps is complete."""
        name = next(filter(None, self.processes.gather(self.stop.requested)))
        self.log.say(f"{name}: saved after step {done} of {self.schedule.total_steps}; the same command goes on")
        raise Preempted(name, done)

    def _lacks(self, told: Told) -> bool:
        """Whether an earlier start was ended between the checkpoint to resume from and what was to be told of it.

        Weights that a run starts from are told of too: what is wrong with them, or with the data, shows there.
        """
        done = self.first_step
        if done == 0 and not self.config.init_from:
            return False
        stage = self._stage_before(done)
        return self.validation.is_missing(stage, done, told) or self.evaluation.is_missing(done, told)

    def _stage_before(self, step: int) -> Stage:
        """The stage that ends with `step` steps done or is then under way."""
        return self.schedule.stage_at(max(step - 1, 0))

    def _examine(self, stage: Stage, done: int, told: Told = frozenset()) -> None:
        """Validates and evaluates as is due after `done` steps; of `told` (event, patch side) the log knows already."""
        try:
            if self.validation.is_missing(stage, done, told):
                for event, side, nll in self.validation.run(self.engine, stage, self._break_off_if_asked):
                    if (event, side) not in told:
                        self.log.validation(event, stage, done, side, nll)
            if self.evaluation.is_missing(done, told):
                elapsed, asked = self.log.clock.elapsed, self._break_off_if_asked
                self.log.evaluation(stage, done, self.evaluation.run(self.engine, stage, done, elapsed, asked))
        except _StopAgreed:
            self._settle()
            if done != self.last_saved:
                self._save(stage, done, must=True)
            self._end_preempted(done)

    def _break_off_if_asked(self) -> None:
        self.watchdog.beat()
        if self.outcomes.must_stop():
            raise _StopAgreed

    def _stage_data(self) -> tuple[CodeStore, CodeStore | None]:
        data = self.config.data
        return stage_shards(data.train, data.cache_dir), stage_shards(data.val, data.cache_dir) if data.val else None

    def _take_run_folder(self) -> str:
        """Makes sure that this run is the folder's, and the only one in it; returns what names its temporary files."""
        run_folder.check_settings(self.config)
        self.lease = Lease(self.run_dir)
        self.lease.acquire(self.log.say)
        self._resources.callback(self.lease.release)
        return self.lease.token

    def _load(self, folder: Path, record: CheckpointRecord) -> None:
        self.processes.on_all(self.engine.read, folder, record.files, record.optimizer_steps)
        self.engine.partitions.publish()

    def _start_from(self, weights: Weights) -> None:
        self.processes.on_all(self.engine.start_from, weights)
        self.engine.partitions.publish()
        digest = self.processes.on_first(lambda: weights.sha256)
        known = {"path": str(weights.path), "kind": weights.variant, "source_step": weights.step, "sha256": digest}
        self.log.write("init", 0, **known)

    def _announce(self) -> None:
        stages = ", ".join(
            f"side {s.patch_side}: {s.steps} steps of {s.batch_size} images ({s.micro_batch_size} at a time)"
            for s in self.schedule.stages
        )
        where = f"resuming after step {self.first_step}" if self.resumed_from else "fresh run"
        where += f" from {self.initial.path} ({self.initial.describe()})" if self.initial else ""
        self.log.say(
            f"{self.config.name}: {where} in {self.run_dir}; {self.config.model.parameters() / 1e6:.1f}M parameters, "
            f"{len(self.train_store)} images, {self.processes.world_size} processes, ZeRO-{self.zero_stage}, "
            f"{self.config.precision}; {stages}"
        )


class _StopAgreed(Exception):
    """All ranks have agreed to stop in the middle of a validation or an evaluation."""


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
