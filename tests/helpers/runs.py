"""Tiny runs for tests: a config over random shards, and the same training in plain PyTorch."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from npp_ds.checkpoint import folders
from npp_ds.checkpoint.rank_files import SavedState
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import StageLoader
from npp_ds.data.store import stage as stage_shards
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.training.engine import initial_model, parameter_groups
from npp_ds.training.hooks import Hook
from npp_ds.training.trainer import Trainer
from shard_sets import write_set

NO_DROPOUT = {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
WATCHED = {
    "optimizer": {"learning_rate": 3e-3, "ema_decay": 0.9},
    "validation": {"every": 7, "batch_size": 8, "weights": "both"},
    "logging": {"every": 1, "samples": True},
}
MEASURED = (
    "images_per_second", "positions_per_second", "model_tflops_per_second", "mfu", "elapsed_seconds",
    "data_wait_share", "peak_memory_gb", "stage_eta_seconds", "eta_seconds",
)  # fmt: skip


def shards_in(folder: Path, seed: int = 0) -> Path:
    """Writes folder/train (160 images) and folder/val (50; 4x4 grid, 1000 codes, 10 classes) unless they are there."""
    if not (folder / "val" / "manifest.json").is_file():
        write_set(folder / "train", 160, 2, seed=seed)
        write_set(folder / "val", 50, 1, seed=seed + 1)
    return folder


def tiny_config(folder: Path, run_dir: Path, **sections: Any) -> RunConfig:
    """Three stages (sides 4, 2, 1) of 10, 10 and 20 steps in fp32 with dropout; `sections` are laid over it."""
    keys = {
        "name": "tiny",
        "run_dir": str(run_dir),
        "precision": "fp32",
        "model": {
            "dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 1000, "grid_size": 4, "num_classes": 10,
            "ffn_multiple_of": 16,
        },
        "data": {"train": str(folder / "train"), "val": str(folder / "val"), "cache_dir": str(folder / "cache")},
        "schedule": {"patch_sides": [4, 2, 1], "epochs": 4, "batch_size": 16, "warmup_epochs": 0.2},
        "optimizer": {"learning_rate": 3e-3},
        "validation": {"every": 7, "batch_size": 8},
        "checkpoint": {"every": 0},
        "logging": {"every": 1},
    }  # fmt: skip
    for name, value in sections.items():
        keys[name] = {**keys.get(name, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(keys)


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock or memory and on when checkpoints were due."""
    lines = (json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines if line["event"] != "checkpoint"]


def state_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest complete checkpoint, whole, and its numbers of steps."""
    folder = folders.newest_complete(run_dir / "checkpoints")
    record = folders.read_record(folder)
    numbers = {"step": torch.tensor(record.step), "optimizer_steps": torch.tensor(record.optimizer_steps)}
    with SavedState(folder, record.files, record.shapes) as saved:
        whole = {f"{kind}/{name}": saved.whole(kind, name) for kind in record.kinds for name in record.shapes}
    return {**numbers, **whole}


class Outcome(NamedTuple):
    """What a run left behind: its metrics, the images of every step, and the state in its newest checkpoint."""

    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    state: dict[str, torch.Tensor]


def outcome_of(run_dir: Path) -> Outcome:
    path = run_dir / "sample_log.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return Outcome(metrics_of(run_dir), samples, state_of(run_dir))


def assert_same(found: Outcome, expected: Outcome) -> None:
    """Bit for bit."""
    assert found.metrics == expected.metrics
    assert found.samples == expected.samples
    assert found.state.keys() == expected.state.keys()
    differ = [name for name, tensor in expected.state.items() if not torch.equal(found.state[name], tensor)]
    assert not differ


def plain_losses(config: RunConfig, steps: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights of `steps` steps in one process, whole batches, without DeepSpeed."""
    store = stage_shards(config.data.train, config.data.cache_dir)
    schedule = config.build_schedule(len(store))
    model = initial_model(config)
    o = config.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, o.weight_decay), lr=1.0, betas=o.betas, eps=o.eps)
    losses, norms = [], []
    for stage in schedule.stages:
        stage = type(stage)(**{**stage.__dict__, "micro_batch_size": stage.batch_size})
        dropout = {"class_dropout": config.data.class_dropout, "num_classes": config.model.num_classes}
        loader = StageLoader(
            store, stage, seed=config.seed, **dropout, rank=0, world_size=1, first_step=stage.start_step
        )
        for batch in loader:
            if batch.step == steps:
                loader.close()
                return losses, norms, model.state_dict()
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(batch.step)
            loss = model(*batch.micro_batches[0])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            norms.append(norm.item())
    return losses, norms, model.state_dict()


def run(processes: Processes, config, from_step: int | None = None) -> None:
    Trainer(config, processes, from_step).run()


def run_and_stop_after(processes: Processes, config, steps: int) -> None:
    """A run that is interrupted once `steps` steps are done, with a checkpoint from that moment."""

    class Interrupted(Exception):
        pass

    class Interrupt(Hook):
        def is_due(self, stage, done):
            return done == steps

        def run(self, context):
            trainer.checkpoints.settle()
            raise Interrupted

    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": steps})})
    trainer = Trainer(config, processes)
    trainer.hooks.insert(trainer.hooks.index(trainer.checkpoints) + 1, Interrupt())
    try:
        trainer.run()
    except Interrupted:
        return
    raise AssertionError("was not interrupted")


def told(
    processes: Processes, config, before: Callable[..., None] = lambda trainer: None, *arguments: Any
) -> list[str]:
    """What a run logs on this rank, for people; `before(trainer, *arguments)` may have prepared it."""
    with logs() as said:
        trainer = Trainer(config, processes)
        before(trainer, *arguments)
        trainer.run()
    return said


@contextmanager
def logs() -> Iterator[list[str]]:
    """The log records of npp_ds from here on, as the screen shows them."""
    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record):
            said.append(("WARNING: " if record.levelno == logging.WARNING else "") + record.getMessage())

    logger, handler = logging.getLogger("npp_ds"), Collect()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def error_of(processes: Processes, config, from_step: int | None = None) -> str:
    try:
        Trainer(config, processes, from_step).run()
    except UserError as error:
        return str(error)
    return "no error"
