"""Killed at any moment, on a full disk, with damaged files: a run goes on from its newest complete checkpoint."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from launches import Launch, finish
from npp_ds.errors import UserError
from npp_ds.files import sha256
from npp_ds.training import checkpoint, saving, state_files
from npp_ds.training.trainer import Trainer
from runs import (
    WATCHED,
    assert_same,
    error_of,
    metrics_of,
    outcome_of,
    run,
    run_and_stop_after,
    tiny_config,
    told,
)
from workers import WorkerError, WorkerPool

pytestmark = pytest.mark.processes


@pytest.fixture
def fresh_pair():
    """Two processes that may be killed."""
    pool = WorkerPool(2)
    yield pool
    pool.stop()


def _die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _DyingShutil:
    rmtree = _die


def _die_in_the_second_save(trainer: Trainer, where: str, rank: int) -> None:
    """Lets `rank` be killed at a moment of the save of step 6."""
    if trainer.processes.rank != rank:
        return
    saver = trainer.saver
    begin = saver.begin

    def armed(record, *arguments):
        if record.step == 6:
            if where == "in the middle of a file":
                blocks = state_files._blocks
                state_files._blocks = lambda *a: (_die() if i > 20 else b for i, b in enumerate(blocks(*a)))
            elif where == "before the record":
                saving.write_record = _die
            elif where == "before the rename":
                saving.fsync_directory = _die
            elif where == "before latest":
                saving.write_text_atomic = _die
            elif where == "while an old one is deleted":
                checkpoint.shutil = _DyingShutil
        begin(record, *arguments)

    saver.begin = armed


@pytest.mark.parametrize(
    "where, rank, expected",
    [
        ("in the middle of a file", 1, 3),
        ("in the middle of a file", 0, 3),
        ("before the record", 0, 3),
        ("before the rename", 0, 3),
        ("before latest", 0, 6),
        ("while an old one is deleted", 0, 6),
    ],
)
def test_crash_safe_when_killed_in_a_save(pair, fresh_pair, shards, tmp_path, undisturbed, where, rank, expected):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 3, "keep_last": 1}, **WATCHED)
    with pytest.raises(WorkerError, match="died with exit code"):
        fresh_pair.run(told, config, _die_in_the_second_save, where, rank)
    assert checkpoint.newest_complete(tmp_path / "run" / "checkpoints").name == f"step-{expected:08d}"
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("victims", [[1], [0], [0, 1]], ids=["one", "the first", "all"])
def test_crash_safe_when_real_processes_are_killed(shards, tmp_path, undisturbed, victims):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 2}, **WATCHED)
    with Launch(config) as launch:
        launch.wait_until_step(13)
        for rank in victims:
            launch.send(rank, signal.SIGKILL)
        codes = launch.exit_codes(timeout=60)
    assert all(code != 0 for code in codes), "nobody is left behind, nobody calls it a success"
    finish(config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def test_crash_safe_torn_checkpoints_are_named_and_passed_over(pair, shards, tmp_path, undisturbed):
    folder = tmp_path / "run"
    config = tiny_config(shards, folder, **WATCHED)
    pair.run(run_and_stop_after, config, 3)
    pair.run(run_and_stop_after, config, 6)
    checkpoints = folder / "checkpoints"
    assert checkpoint.saved_steps(checkpoints) == [6, 3]
    newest = checkpoints / "step-00000006"
    victim, record = newest / "rank-00001-of-00002.safetensors", newest / "COMPLETE.json"
    words = {victim: ("bytes, expected", "SHA-256 is not the recorded", "missing"), record: ("record",) * 3}
    for path in (victim, record):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for damage, word in zip((whole[:-4], flipped, None), words[path], strict=True):
            path.unlink() if damage is None else path.write_bytes(damage)
            said: list[str] = []
            assert checkpoint.newest_complete(checkpoints, said.append) == checkpoints / "step-00000003"
            assert "step-00000006 is torn" in said[0]
            assert word in said[0]
            with pytest.raises(UserError, match="asked for, but torn"):
                checkpoint.asked_for(checkpoints, 6)
        path.write_bytes(whole)
    assert checkpoint.newest_complete(checkpoints) == newest
    victim.unlink()
    told = pair.run(error_of, config, 6)
    assert "asked for, but torn" in told[0]
    assert "no such checkpoint; saved steps: 6, 3" in pair.run(error_of, config, 5)[0]
    assert len(metrics_of(folder)) > 0, "a refused start changes nothing"
    pair.run(run, config)
    assert_same(outcome_of(folder), undisturbed)


def test_crash_safe_a_damaged_latest_is_named_and_changes_nothing(pair, shards, tmp_path, undisturbed):
    config = tiny_config(shards, tmp_path / "run", **WATCHED)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    pair.run(run_and_stop_after, config, 3)
    latest.write_bytes(b"\xf3tep-00000003")
    pair.run(run_and_stop_after, config, 6)
    assert latest.read_text() == "step-00000006"
    latest.write_bytes(b"x" * 300)
    said = pair.run(told, config)[0]
    assert any("resuming after step 6" in line for line in said)
    assert any(f"which {latest} names, is gone" in line for line in said)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def test_crash_safe_never_means_a_silent_fresh_start(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000003" / "COMPLETE.json").unlink()
    assert "none of its checkpoints (3) is complete" in pair.run(error_of, config)[0]
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load_weights(tmp_path / "run")
    shutil.rmtree(checkpoints / "step-00000003")
    assert "none of its checkpoints (step-00000003) is complete" in pair.run(error_of, config)[0]
    shutil.rmtree(checkpoints)
    said = pair.run(told, config)[0]
    assert f"{tmp_path / 'run'}: an earlier start saved no checkpoint; starting from the beginning" in said


def test_a_checkpoint_of_another_format_is_an_error_and_not_passed_over(tmp_path):
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    (folder / "COMPLETE.json").write_text(json.dumps({"format": 99, "news": 1}))
    with pytest.raises(UserError, match="format 99, this version reads 2"):
        checkpoint.newest_complete(tmp_path)


def test_going_on_from_an_earlier_step_sets_later_checkpoints_aside(pair, shards, tmp_path, undisturbed):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 4, "keep_last": 9}, **WATCHED)
    pair.run(run, config)
    checkpoints = tmp_path / "run" / "checkpoints"
    later = [s for s in checkpoint.saved_steps(checkpoints) if s > 12]
    pair.run(run, config, 12)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)
    assert len(list(checkpoints.glob("set-aside-step-*"))) == len(later)


def _cannot_write_at(trainer: Trainer, steps: list[int]) -> None:
    """Lets the second rank find no room when it saves these steps: the kernel refuses to let a file grow."""
    saver, begin = trainer.saver, trainer.saver.begin
    if trainer.processes.rank != 1:
        return

    def short_of_room(record, *arguments):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if record.step in steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            begin(record, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    saver.begin = short_of_room


def test_crash_safe_on_a_full_disk_the_run_lives_and_the_earlier_checkpoint_stays(pair, shards, tmp_path, undisturbed):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 3}, **WATCHED)
    said = [line for line in pair.run(told, config, _cannot_write_at, [6, 9])[0] if "WARNING" in line]
    assert len(said) == 2
    assert "the checkpoint of step 6 could not be written: rank 1:" in said[0]
    assert "File too large; the last one is that of step 3; make room or mend the disk; the run goes on" in said[0]
    found = outcome_of(tmp_path / "run")
    failed = [line for line in found.metrics if line["event"] == "save_failed"]
    assert [line["step"] for line in failed] == [6, 9]
    assert_same(found._replace(metrics=[m for m in found.metrics if m["event"] != "save_failed"]), undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


def test_crash_safe_a_run_whose_last_checkpoint_cannot_be_written_says_so_and_can_be_finished(
    pair, shards, tmp_path, undisturbed
):
    config = tiny_config(shards, tmp_path / "run", **WATCHED)
    with pytest.raises(WorkerError, match=r"the checkpoint of step 40 could not be written.*then start again"):
        pair.run(told, config, _cannot_write_at, [40])
    assert checkpoint.newest_complete(tmp_path / "run" / "checkpoints").name == "step-00000020"
    pair.run(run, config)
    found = outcome_of(tmp_path / "run")
    assert_same(found, undisturbed)


def test_a_checkpoint_that_holds_code_is_not_run(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    marker = tmp_path / "executed"
    victim = folder / "rank-00000-of-00002.safetensors"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"module": Payload()}, victim)
    record = checkpoint.read_record(folder)
    record.files[victim.name] = {"bytes": victim.stat().st_size, "sha256": sha256(victim)}
    checkpoint.write_record(folder, record)
    with pytest.raises(UserError, match="not a file of a checkpoint of this model"):
        checkpoint.load_weights(tmp_path / "run")
    assert "not a file of a checkpoint of this model" in pair.run(error_of, config)[0]
    assert not marker.exists()
