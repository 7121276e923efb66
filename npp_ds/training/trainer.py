"""A training run from top to bottom: data, schedule, engine, resume, the loop over steps and its hooks."""

import logging
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NoReturn

from npp_ds.checkpoint.folders import CheckpointRecord
from npp_ds.checkpoint.open import Weights
from npp_ds.checkpoint.saver import CheckpointSaver
from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import StageLoader, StageManager
from npp_ds.distributed.process_group import Processes, join_processes, leave_processes
from npp_ds.training import run_folder
from npp_ds.training.checkpointing import Checkpointing
from npp_ds.training.engine import TrainingEngine
from npp_ds.training.evaluation import Evaluation
from npp_ds.training.hooks import Context, Hook, Logged, StepResults, StopAgreed, next_due
from npp_ds.training.lease import Lease
from npp_ds.training.loss_checks import LossChecks, NonFinitePolicy
from npp_ds.training.preemption import Preempted, StopRequests
from npp_ds.training.preflight import fitting_schedule, initial_weights, staged_sets
from npp_ds.training.profiler import StepProfiler
from npp_ds.training.run_log import RunLog
from npp_ds.training.validation import Validation
from npp_ds.training.watchdog import Watchdog
from npp_ds.utils.screen import show_logs

logger = logging.getLogger(__name__)


def train(config: RunConfig, from_step: int | None, stop: StopRequests) -> None:
    """Train a run to its last step, from its newest complete checkpoint if there is one, in each process of the launch.

    `from_step` asks for the checkpoint of exactly that step; later ones are set aside. `stop` notes signals. Raises
    UserError, NonFiniteError for a loss or gradients that are not finite, Preempted after a signal and a checkpoint.
    """
    processes = join_processes(end_if_asked=stop.end_before_meeting)
    show_logs(processes.rank)
    try:
        Trainer(config, processes, from_step, stop).run()
    finally:
        leave_processes()


class Trainer:
    """One process's part in a run. All processes do the same steps; the first one also writes."""

    def __init__(
        self, config: RunConfig, processes: Processes, from_step: int | None = None, stop: StopRequests | None = None
    ):
        self.config, self.processes, self.stop = config, processes, stop or StopRequests()
        self.log = RunLog(config, processes)
        with ExitStack() as self._resources:
            self._resources.callback(self.log.close)
            self._set_up(from_step)
            self._resources = self._resources.pop_all()  # nothing has failed: `close` releases them

    def _set_up(self, from_step: int | None) -> None:
        config, processes, log = self.config, self.processes, self.log

        # Schedule, data, run folder, and the checkpoint to resume from
        self.schedule: Schedule = processes.on_first(fitting_schedule, config, processes.world_size)
        self.train_store, val_store = staged_sets(config.data, processes)
        fingerprint = self.train_store.manifest.fingerprint()
        self.lease: Lease | None = None
        token: str = processes.on_first(self._take_run_folder)
        processes.on_all(run_folder.check_shared, config.directory, token)
        self.resumed_from: tuple[Path, CheckpointRecord] | None = processes.on_first(
            run_folder.checkpoint_to_resume, config, fingerprint, from_step
        )
        processes.on_first(run_folder.write_config, config)
        record = self.resumed_from[1] if self.resumed_from else None
        self.first_step = record.step if record else 0
        self.initial: Weights | None = None if record else processes.on_first(initial_weights, config)

        # Is there anything left to do?
        # Without a checkpoint, what an earlier start logged at step 0 may be of other weights.
        processes.on_first(log.open, -1 if self.initial else self.first_step)
        self.validation = Validation(config, self.schedule, val_store, processes, log)
        self.evaluation = Evaluation(config, self.schedule, self.train_store.manifest.tokenizer, processes, log)
        self.already_logged: Logged = processes.on_first(log.already_logged, self.first_step)
        self.is_finished = self.first_step == self.schedule.total_steps and not self._unfinished_hooks()
        if self.is_finished:
            return
        self._end_if_asked()
        self.evaluation.load()

        # The engine and the objects that use it
        self.engine = TrainingEngine(config, self.schedule.stages[0], processes)
        self.stages = StageManager(config, self.schedule, self.train_store, processes)
        self.profiler = StepProfiler(config, processes, log)
        self.watchdog = Watchdog(config.directory / "stalled.txt", processes.rank, config.watch.stall_seconds)
        folder, asynchronous = config.directory / "checkpoints", config.checkpoint.asynchronous
        saver = CheckpointSaver(folder, processes, token, self.lease, self.watchdog.progress, asynchronous)
        self._resources.callback(saver.close)
        self.results = StepResults(processes, self.stop, self.lease, saver)
        self.nonfinite = policy = NonFinitePolicy(config, processes, log, record)
        self.checkpoints = Checkpointing(config, self.schedule, processes, log, saver, policy, fingerprint, record)
        self.loss_checks = LossChecks(config, processes, log)
        self.hooks: list[Hook] = [self.checkpoints, log, self.loss_checks, self.validation, self.evaluation]

    def close(self) -> None:
        """Release the run folder and close all files; `run` does so by itself."""
        self._resources.close()

    def run(self) -> None:
        """Train to the last step. Raises what `train` raises."""
        with closing(self):
            if self.is_finished:
                logger.info(f"{self.config.directory}: already trained to its last step, {self.first_step}")
                self.log.end(self.first_step)
                return
            if self.resumed_from:
                self._load(*self.resumed_from)
            elif self.initial:
                self._start_from(self.initial)
            self._end_if_asked()
            how = f"resuming after step {self.first_step}" if self.resumed_from else "fresh run"
            how += f" from {self.initial.path} ({self.initial.describe()})" if self.initial else ""
            self.processes.on_first(run_folder.record_start, self.config, self.processes, len(self.train_store))
            self.log.start(self.schedule, self.first_step, self.engine, how)
            with self.watchdog:
                self._train()
            self.log.end(self.schedule.total_steps)

    def _train(self) -> None:
        step = self.first_step
        if step == 0 and self.nonfinite.rolls_back and not self.resumed_from:
            self.checkpoints.save(self.engine, self.schedule.stages[0], 0)
        if hooks := self._unfinished_hooks():
            self._run_hooks(hooks, self._stage_before(step), step, self.already_logged)
        while step < self.schedule.total_steps:
            with self.profiler.profiling(step), closing(self.stages.loaders(step)) as loaders:
                for loader in loaders:
                    step = self._train_stage(loader)
                    if step < loader.stage.end_step:
                        break  # rolled back

    def _train_stage(self, loader: StageLoader) -> int:
        """Train to the end of a stage, or to a step that rolls back; return the number of steps that are then done."""
        stage, due_at = loader.stage, 0
        self.engine.set_stage(stage)
        for batch in self.profiler.around(loader):
            self.watchdog.progress.set()
            if batch.step == stage.start_step:
                self.log.begin_stage(stage)
            if batch.step >= due_at:
                due_at = next_due(self.hooks, stage, batch.step)
            result = None
            if batch.step not in self.nonfinite.excluded_steps:
                result = self.engine.step(batch.step, batch.micro_batches, stage.learning_rate(batch.step))
            if result and not result.was_applied:
                self._follow_steps()
                self.checkpoints.settle()
                facts = self.nonfinite.exclude(stage, batch, result)
                if self.nonfinite.rolls_back:
                    return self._roll_back(batch.step, facts)
                result = None
            self.results.add(stage, batch, result, self.stages.wait_seconds)
            done = batch.step + 1
            self._follow_steps(leave=0 if done == due_at else 1)
            if self.results.must_stop:
                self._save_and_end(stage, done)
            if done == due_at:
                self._run_hooks([hook for hook in self.hooks if hook.is_due(stage, done)], stage, done)
        return stage.end_step

    def _follow_steps(self, leave: int = 0) -> None:
        """Wait for the results of the steps in progress but the last `leave`, and show them to the hooks."""
        for step in self.results.take(leave):
            if step.checkpoint_is_written:
                self.checkpoints.settle()
            for hook in self.hooks:
                hook.after_step(step)

    def _run_hooks(self, hooks: list[Hook], stage: Stage, done: int, already_logged: Logged = frozenset()) -> None:
        context = Context(self.engine, self.results, self.watchdog.progress, stage, done, already_logged)
        with self.log.clock.paused():
            try:
                for hook in hooks:
                    hook.run(context)
            except StopAgreed:
                self._save_and_end(stage, done)

    def _unfinished_hooks(self) -> list[Hook]:
        """Return the hooks that were due at the checkpoint's step and that an earlier start did not finish.

        Weights that a run starts from are validated, too: what is wrong with them, or with the data, shows there.
        """
        done = self.first_step
        if done == 0 and not self.config.init_from:
            return []
        stage = self._stage_before(done)
        return [hook for hook in (self.validation, self.evaluation) if hook.is_due(stage, done, self.already_logged)]

    def _stage_before(self, step: int) -> Stage:
        """Return the stage that ends with `step` steps done or is then in progress."""
        return self.schedule.stage_at(max(step - 1, 0))

    def _roll_back(self, failed_step: int, facts: dict[str, Any]) -> int:
        """Load the newest complete checkpoint; return the step to continue with. Excluded steps stay excluded."""
        with self.watchdog.patient(), self.log.clock.paused():
            folder, record = self.processes.on_first(self.checkpoints.newest)
            self._load(folder, record)
            self.checkpoints.last_saved = record.step
            self.processes.on_first(self.log.rewind, record.step)
        self.loss_checks.reset()
        self.log.write("rollback", record.step, failed_step=failed_step, rollbacks=self.nonfinite.rollbacks, **facts)
        excluded = ", ".join(map(str, sorted(self.nonfinite.excluded_steps)))
        logger.info(f"rolled back to {folder.name} (rollback {self.nonfinite.rollbacks}); excluded steps: {excluded}")
        return record.step

    def _end_if_asked(self) -> None:
        """End a start that a signal has asked to stop before its first step; there is nothing new to save."""
        if names := list(filter(None, self.processes.gather(self.stop.requested))):
            logger.info(f"{names[0]}: stopped before the first step of this start; rerun the same command to resume")
            raise Preempted(names[0], self.first_step)

    def _save_and_end(self, stage: Stage, done: int) -> NoReturn:
        """End a run that a signal has asked to stop, with a complete checkpoint of `done` steps."""
        name = next(filter(None, self.processes.gather(self.stop.requested)))
        if name == "SIGINT":
            logger.info(f"SIGINT: saving after step {done}; a second Ctrl-C ends the run at once, without saving")
        self.checkpoints.settle()
        if done != self.checkpoints.last_saved:
            self.checkpoints.save(self.engine, stage, done, must=True)
        logger.info(f"{name}: saved after step {done} of {self.schedule.total_steps}; rerun the same command to resume")
        raise Preempted(name, done)

    def _take_run_folder(self) -> str:
        """Make sure that the run folder is this run's, and the only start in it; return the name of this start."""
        run_folder.check_settings(self.config)
        self.lease = Lease(self.config.directory)
        self.lease.acquire()
        self._resources.callback(self.lease.release)
        return self.lease.token

    def _load(self, folder: Path, record: CheckpointRecord) -> None:
        self.processes.on_all(self.engine.read, folder, record.files, record.optimizer_steps)
        self.engine.partitions.publish()

    def _start_from(self, weights: Weights) -> None:
        self.processes.on_all(self.engine.start_from, weights)
        self.engine.partitions.publish()
        digest = self.processes.on_first(lambda: weights.sha256)
        self.log.write("init", 0, path=str(weights.path), kind=weights.variant, source_step=weights.step, sha256=digest)
