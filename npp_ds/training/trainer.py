"""A training run from top to bottom: data, schedule, engine, resume, the loop over steps, what is done after each."""

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import npp_ds
from npp_ds.config import RunConfig
from npp_ds.config_checks import load_config, problems_of
from npp_ds.data.loader import EvalLoader
from npp_ds.data.store import CodeStore
from npp_ds.data.store import stage as stage_shards
from npp_ds.errors import UserError
from npp_ds.evaluation.nll import mean_nll
from npp_ds.files import write_json_atomic, write_text_atomic
from npp_ds.model.attention import check_attention
from npp_ds.schedule import Schedule, Stage
from npp_ds.training import checkpoint
from npp_ds.training.checkpoint import CheckpointRecord
from npp_ds.training.deepspeed_config import engine_settings, read_settings
from npp_ds.training.engine import StepResult, TrainingEngine
from npp_ds.training.launch import Processes, join_processes, leave_processes
from npp_ds.training.metrics import MetricsLog, Progress
from npp_ds.training.stages import StageManager


def train(config: RunConfig) -> None:
    """Trains the run that `config` describes, from its newest complete checkpoint when there is one, to its last step.

    Called by every process of the launch. Raises UserError for what a person can mend, NonFiniteError when the loss or
    the gradients left the finite numbers.
    """
    processes = join_processes()
    try:
        Trainer(config, processes).run()
    finally:
        leave_processes()


class Trainer:
    """One process's part in a run; all processes do the same steps, the first one also writes."""

    def __init__(self, config: RunConfig, processes: Processes):
        self.config, self.processes = config, processes
        self.train_store, self.val_store = self._on_all_ranks(self._stage_data)
        self.schedule: Schedule = self._on_first_rank(self._schedule)
        self.run_dir = config.directory
        self.checkpoints = self.run_dir / "checkpoints"
        self.metrics: MetricsLog | None = None
        self.progress: Progress | None = None
        self.zero_stage: int = read_settings(config.deepspeed.config)["zero_optimization"]["stage"]
        self._on_first_rank(self._check_run_folder)
        self.resumed_from: Path | None = self._on_first_rank(self._checkpoint_to_resume)
        self._on_first_rank(self._describe_run)
        self.engine = TrainingEngine(config, self.schedule.stages[0], processes)

    def run(self) -> None:
        first_step = self._restore()
        self._on_first_rank(lambda: self._open_metrics(first_step))
        try:
            if first_step == self.schedule.total_steps:
                self._say(f"{self.run_dir}: already trained to its last step, {first_step}; nothing to do")
                self._write("end", first_step, elapsed_seconds=self.metrics.elapsed_before if self.metrics else 0.0)
                return
            if self.processes.is_first:
                self.progress = Progress(self.schedule.total_steps, first_step, len(self.schedule.stages))
            self._announce(first_step)
            self._train(first_step)
        finally:
            if self.progress:
                self.progress.close()
            if self.metrics:
                self.metrics.close()

    def _train(self, first_step: int) -> None:
        clock = _Clock(self.metrics.elapsed_before if self.metrics else 0.0)
        manager = StageManager(self.config, self.schedule, self.train_store, self.engine, self.processes)
        for stage, batch in manager.batches(first_step):
            if batch.step == stage.start_step:
                self._enter(stage, clock)
            result = self.engine.step(batch.step, batch.micro_batches, stage.learning_rate(batch.step))
            if batch.step == 0:
                self._check_first_loss(result.loss)
            clock.count(stage.batch_size)
            done = batch.step + 1
            stage_is_over = done == stage.end_step
            if done % self.config.logging.every == 0 or stage_is_over or done == 1:
                self._log(stage, batch.epoch, done, result, clock, manager.wait_seconds)
            with clock.paused():
                if stage_is_over or _due(done, self.config.validation.every):
                    self._validate(stage, done)
                if stage_is_over or _due(done, self.config.checkpoint.every):
                    self._save(stage, done)
        self._write("end", self.schedule.total_steps, elapsed_seconds=clock.elapsed)

    def _schedule(self) -> Schedule:
        """The run's steps on this data. Raises UserError with all misfits between config, data and processes."""
        world_size = self.processes.world_size
        problems = problems_of(self.config, world_size, len(self.train_store))
        problems += self._engine_problems() if not problems else []
        for key, store in (("train", self.train_store), ("val", self.val_store)):
            problems += _data_problems(key, store, self.config) if store else []
        if self.val_store and self.train_store.manifest.tokenizer.sha256 != self.val_store.manifest.tokenizer.sha256:
            problems.append("data.val: made with another tokenizer than data.train; tokenize both with the same one")
        if problems:
            raise UserError("the config does not fit the data:\n" + "\n".join(f"  - {p}" for p in problems))
        return self.config.build_schedule(len(self.train_store), world_size)

    def _engine_problems(self) -> list[str]:
        """What DeepSpeed's settings and the attention kernel would refuse once everything is set up."""
        first = self.config.build_schedule(len(self.train_store), self.processes.world_size).stages[0]
        problems = []
        for check in (
            lambda: engine_settings(self.config, first, self.processes.world_size),
            lambda: check_attention(self.config.model.attention),
        ):
            try:
                check()
            except UserError as error:
                problems.append(str(error))
        return problems

    def _stage_data(self) -> tuple[CodeStore, CodeStore | None]:
        data = self.config.data
        return stage_shards(data.train, data.cache_dir), stage_shards(data.val, data.cache_dir) if data.val else None

    def _open_metrics(self, first_step: int) -> None:
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", first_step)

    def _check_run_folder(self) -> None:
        """Raises UserError when the run folder belongs to a run with other settings."""
        path = self.run_dir / "config.yaml"
        if path.is_file():
            before = load_config(file=path)
            if before.hash() != self.config.hash():
                raise UserError(
                    f"{path}: this folder holds a run with other settings ({_differences(before, self.config)}); "
                    "set run_dir to a new folder, or these keys back"
                )

    def _describe_run(self) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.run_dir / "config.yaml", self.config.to_yaml())
        write_json_atomic(self.run_dir / "environment.json", _environment(self.processes))

    def _on_first_rank(self, action: Callable[[], Any]) -> Any:
        """Result of `action()` on the first rank, for all ranks; what a person can mend is raised on all of them."""
        outcome = [_attempt(action) if self.processes.is_first else None]
        torch.distributed.broadcast_object_list(outcome, device=self.processes.device)
        result, problem = outcome[0]
        if problem is not None:
            raise UserError(problem, on_all_ranks=True)
        return result

    def _on_all_ranks(self, action: Callable[[], Any]) -> Any:
        """This rank's result of `action()`; what a person can mend on any rank is raised on all of them."""
        result, problem = _attempt(action)
        problems: list[Any] = [None] * self.processes.world_size
        torch.distributed.all_gather_object(problems, problem)
        if found := [p for p in problems if p is not None]:
            raise UserError(found[0], on_all_ranks=True)
        return result

    def _restore(self) -> int:
        """Loads the checkpoint to resume from; returns the step to go on with, 0 for a fresh run."""
        if self.resumed_from is None:
            return 0
        checkpoint.load(self.engine.engine, self.resumed_from)
        return checkpoint.read_record(self.resumed_from).step

    def _checkpoint_to_resume(self) -> Path | None:
        folder = checkpoint.newest_complete(self.checkpoints)
        if folder is None:
            if steps := checkpoint.saved_steps(self.checkpoints):
                raise UserError(
                    f"{self.checkpoints}: none of its checkpoints ({', '.join(map(str, steps))}) is complete; "
                    "restore one, or remove the run folder to start from the beginning"
                )
            return None
        record = checkpoint.read_record(folder)
        found = (record.world_size, record.zero_stage, record.precision)
        expected = (self.processes.world_size, self.zero_stage, self.config.precision)
        if found != expected:
            raise UserError(
                f"{folder}: saved by {found[0]} processes with ZeRO-{found[1]} in {found[2]}, this start has "
                f"{expected[0]} processes with ZeRO-{expected[1]} in {expected[2]}; start it as it was saved"
            )
        if record.data_fingerprint != self.train_store.manifest.fingerprint():
            raise UserError(
                f"{folder}: trained on other shards than those in data.train ({self.config.data.train}), as the "
                "fingerprint of their manifest shows; name the shards it was trained on, or set run_dir to a new folder"
            )
        if record.config_hash != self.config.hash():
            raise UserError(
                f"{folder}: saved by a run with other settings than {self.run_dir / 'config.yaml'} has now; "
                "set run_dir to a new folder, or the settings back"
            )
        return folder

    def _announce(self, first_step: int) -> None:
        stages = ", ".join(f"side {s.patch_side}: {s.steps} steps" for s in self.schedule.stages)
        where = f"resuming after step {first_step}" if first_step else "fresh run"
        self._say(
            f"{self.config.name}: {where} in {self.run_dir}; {self.config.model.parameters() / 1e6:.1f}M parameters, "
            f"{len(self.train_store)} images, {self.processes.world_size} processes, ZeRO-{self.zero_stage}, "
            f"{self.config.precision}; {stages}"
        )

    def _enter(self, stage: Stage, clock: "_Clock") -> None:
        shape = {k: v for k, v in asdict(stage).items() if k not in ("index", "start_step")}
        self._write("stage", stage.start_step, stage=stage.index, elapsed_seconds=clock.elapsed, **shape)

    def _check_first_loss(self, loss: float) -> None:
        expected = math.log(self.config.model.vocab_size)
        if abs(loss - expected) > 1e-3:
            raise RuntimeError(
                f"the first loss of a fresh run is {loss:.5f}, not ln(vocab_size) = {expected:.5f}: its output head "
                "starts at zero, so either the weights are not fresh or codes and loss do not fit; nothing was saved"
            )

    def _log(self, stage: Stage, epoch: int, done: int, result: StepResult, clock: "_Clock", waited: float) -> None:
        line = {
            "stage": stage.index,
            "patch_side": stage.patch_side,
            "epoch": epoch,
            "loss": result.loss,
            "learning_rate": stage.learning_rate(done - 1),
            "grad_norm": result.grad_norm,
            "images_per_second": clock.rate(),
            "elapsed_seconds": clock.elapsed,
            "data_wait_seconds": waited,
        }
        self._write("train", done, **line)
        if self.processes.is_first:
            steps_left = self.schedule.total_steps - done
            self.progress.show({"step": done, **line}, steps_left * clock.seconds_per_step)
        names = ("loss", "learning_rate", "grad_norm", "images_per_second", "patch_side")
        self.engine.write_events([(f"train/{name}", line[name], done) for name in names])

    def _validate(self, stage: Stage, done: int) -> None:
        if self.val_store is None:
            return
        v = self.config.validation
        for side in sorted({1, stage.patch_side}):
            ranks = self.processes.rank, self.processes.world_size
            loader = EvalLoader(self.val_store, side, v.batch_size, *ranks, limit=v.limit)
            nll = mean_nll(self.engine.model, loader, self.processes.device)
            self._write("validation", done, stage=stage.index, patch_side=side, nll=nll)
            self._say(f"validation after step {done}: {nll:.4f} nats per code at side {side}")
            self.engine.write_events([(f"validation/nll_side_{side}", nll, done)])

    def _save(self, stage: Stage, done: int) -> None:
        record = CheckpointRecord(
            step=done,
            stage=stage.index,
            world_size=self.processes.world_size,
            zero_stage=self.zero_stage,
            precision=self.config.precision,
            config_hash=self.config.hash(),
            data_fingerprint=self.train_store.manifest.fingerprint(),
        )
        checkpoint.save(self.engine.engine, self.checkpoints, record)
        if self.processes.is_first:
            ends = {s.end_step for s in self.schedule.stages}
            checkpoint.remove_old(self.checkpoints, done, self.config.checkpoint.keep_last, ends, self._say)

    def _write(self, event: str, step: int, **values: Any) -> None:
        if self.metrics:
            self.metrics.write(event, step, **values)

    def _say(self, text: str) -> None:
        if self.processes.is_first:
            self.progress.say(text) if self.progress else print(text, flush=True)


class _Clock:
    """Seconds of training (without validation and saving) and images since the last question."""

    def __init__(self, elapsed_before: float):
        self._before, self._started = elapsed_before, time.perf_counter()
        self._images = self._steps = 0
        self._mark = self._started
        self.seconds_per_step = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of training since the run's first start, validation and saving apart."""
        return self._before + time.perf_counter() - self._started

    def count(self, images: int) -> None:
        self._images += images
        self._steps += 1

    def rate(self) -> float:
        """Images per second since the last call."""
        now = time.perf_counter()
        seconds, images, steps = now - self._mark, self._images, self._steps
        self._mark, self._images, self._steps = now, 0, 0
        self.seconds_per_step = seconds / max(1, steps)
        return images / seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            lost = time.perf_counter() - began
            self._started += lost
            self._mark += lost


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, what a person can mend): wrong input, or files that cannot be read or written."""
    try:
        return action(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename}: {error.strerror}; mend that or name another place"


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _data_problems(key: str, store: CodeStore, config: RunConfig) -> list[str]:
    manifest, model = store.manifest, config.model
    return [
        f"model.{name}: {getattr(model, name)}, but the shards of data.{key} ({getattr(config.data, key)}) have "
        f"{getattr(manifest, name)}; set model.{name}={getattr(manifest, name)} or name other shards"
        for name in ("grid_size", "vocab_size", "num_classes")
        if getattr(model, name) != getattr(manifest, name)
    ]


def _differences(a: RunConfig, b: RunConfig) -> str:
    def flat(value: Any, key: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                k: v for name, part in value.items() for k, v in flat(part, f"{key}.{name}" if key else name).items()
            }
        return {key: value}

    old, new = flat(a.bound_keys()), flat(b.bound_keys())
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} now" for k in changed)


def _environment(processes: Processes) -> dict[str, Any]:
    versions = {}
    for package in ("torch", "deepspeed", "numpy", "flash-attn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cuda = processes.device.type == "cuda"
    return {
        "npp_ds": npp_ds.__version__,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(processes.device) if cuda else platform.processor() or platform.machine(),
        "world_size": processes.world_size,
    }
