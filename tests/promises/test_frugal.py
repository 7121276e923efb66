"""Memory stays flat, old checkpoints go but never the last complete one, and the price of saving is told."""

import os
import random
import re
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

from npp_ds.checkpoint import folders
from npp_ds.checkpoint.folders import CheckpointRecord
from npp_ds.checkpoint.rank_files import Fragment, SavedState, write_state
from npp_ds.distributed.process_group import Processes
from npp_ds.training.metrics import events_named, read_events
from npp_ds.training.trainer import Trainer
from runs import WATCHED, run, tiny_config

pytestmark = pytest.mark.processes


def _anonymous_memory() -> int:
    """This process's anonymous memory in KiB; mapped files do not count."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _anonymous_memory_over_rebuilds(processes: Processes, config, rounds: int) -> list[int]:
    """Anonymous memory in KiB after each walk through all stages: two steps in each, with a loader of its own."""
    trainer = Trainer(config, processes)
    measured = []
    for _ in range(rounds):
        for stage in trainer.schedule.stages:
            trainer.engine.set_stage(stage)
            with closing(trainer.stages.loaders(stage.start_step)) as loaders:
                for batch in islice(next(loaders), 2):
                    trainer.engine.step(batch.step, batch.micro_batches, stage.learning_rate(batch.step))
        measured.append(_anonymous_memory())
    trainer.close()
    return measured


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_frugal_twenty_rebuilds_and_stage_changes_leave_anonymous_memory_flat(pair, shards, tmp_path, zero_stage):
    config = tiny_config(shards, tmp_path / "run", deepspeed={"config": f"zero{zero_stage}"})
    for measured in pair.run(_anonymous_memory_over_rebuilds, config, 25):
        assert measured[-1] < 1.02 * measured[4], measured


def test_frugal_keeps_the_last_the_multiples_and_the_ends_of_stages(pair, shards, tmp_path):
    keys = {"checkpoint": {"every": 3, "keep_last": 2, "keep_every": 12}, "validation": {"every": 0}}
    pair.run(run, tiny_config(shards, tmp_path / "run", **keys))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert folders.saved_steps(checkpoints) == [40, 39, 36, 24, 20, 12, 10]
    assert (checkpoints / "latest").read_text() == "step-00000040"
    assert not list(checkpoints.glob("*.tmp"))


def _write(checkpoints: Path, step: int, whole: bool = True) -> None:
    folder = folders.folder_of(checkpoints, step)
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    entry = {"bytes": 1, "sha256": folders.sha256(folder / "file")}
    hashes = {"config_hash": "", "data_fingerprint": "", "optimizer_steps": step, "kinds": [], "shapes": {}}
    record = CheckpointRecord(step, 0, 1, 2, "fp32", **hashes, files={"file": entry})
    if whole:
        folders.write_record(folder, record)


def test_frugal_never_deletes_the_newest_complete_checkpoint(tmp_path):
    rng = random.Random(0)
    for case in range(100):
        checkpoints = tmp_path / str(case)
        steps = rng.sample(range(50), 8)
        newest = max(steps)
        for step in steps:
            _write(checkpoints, step, whole=step == newest or rng.random() < 0.7)
        later = newest + 1
        _write(checkpoints, later)
        keep_last = rng.randint(1, 4)
        folders.remove_old(checkpoints, newest, keep_last, 7, [])
        left = folders.saved_steps(checkpoints)
        assert left[:2] == [later, newest], "later steps are none of this run's"
        assert folders.find_problem(folders.folder_of(checkpoints, newest)) is None
        assert len([s for s in left if s < newest and s % 7]) <= keep_last - 1
        assert all((folders.folder_of(checkpoints, s) / "COMPLETE.json").exists() for s in left), "no rubble"


def test_frugal_tells_what_saving_costs_the_loop(pair, shards, tmp_path):
    keys = {**WATCHED, "checkpoint": {"every": 8}, "validation": {"every": 0}}
    pair.run(run, tiny_config(shards, tmp_path / "at_once", **keys))
    keys["checkpoint"]["asynchronous"] = True
    pair.run(run, tiny_config(shards, tmp_path / "in_thread", **keys))
    for name in ("at_once", "in_thread"):
        saves = events_named(read_events(tmp_path / name / "metrics.jsonl"), "checkpoint")
        assert [e["step"] for e in saves] == [8, 10, 16, 20, 24, 32, 40]
        newest = tmp_path / name / "checkpoints" / "step-00000040"
        files = sum(os.path.getsize(f) for f in newest.glob("*.safetensors"))
        assert saves[-1]["bytes"] == files
        assert all(0 < e["seconds"] < 60 for e in saves)


def test_frugal_reading_a_state_takes_a_small_part_of_its_size(tmp_path):
    numel, count = 1 << 20, 48
    flat = [torch.zeros(numel * count)]
    fragments = [Fragment(f"p{i}", 0, numel, 0, i * numel) for i in range(count)]
    write_state(tmp_path / "rank", fragments, {"master": flat})
    del flat
    peak = 0
    before = _anonymous_memory()
    with SavedState(tmp_path, ["rank"], {f"p{i}": (numel,) for i in range(count)}) as saved:
        for i in range(count):
            saved.whole("master", f"p{i}")
            peak = max(peak, _anonymous_memory() - before)
    assert peak < 4 * numel * count / 1024 / 4, "KiB, a quarter of the state"
