"""Killed at any moment, on a full disk, with damaged files: a run goes on from its newest complete checkpoint."""

import errno
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from launches import Launch, finish
from npp_ds.checkpoint import folders, rank_files
from npp_ds.checkpoint import saver as saver_module
from npp_ds.checkpoint.folders import CheckpointRecord
from npp_ds.checkpoint.open import open_weights
from npp_ds.checkpoint.rank_files import Fragment
from npp_ds.checkpoint.saver import CheckpointSaver
from npp_ds.distributed.environment import host_name
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.training.metrics import read_events
from npp_ds.training.run_folder import _set_aside_later_than, checkpoint_to_resume
from npp_ds.training.trainer import Trainer
from npp_ds.utils.files import sha256
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


def test_crash_safe_a_start_removes_what_killed_ones_left_of_files_and_checkpoints(tmp_path):
    leftovers = [".config.yaml.12.tmp", ".metrics.jsonl.12.tmp", "checkpoints/.latest.12.tmp"]
    (tmp_path / "checkpoints/step-00000003.ab12.tmp").mkdir(parents=True)
    for name in leftovers:
        (tmp_path / name).write_text("half")
    assert checkpoint_to_resume(tiny_config(tmp_path, tmp_path), "fingerprint", None) is None
    assert not list(tmp_path.rglob("*.tmp"))


def _die_in_the_second_save(trainer: Trainer, where: str, rank: int) -> None:
    """Lets `rank` be killed at a moment of the save of step 6."""
    if trainer.processes.rank != rank:
        return
    saver = trainer.checkpoints.saver
    begin = saver.begin

    def armed(record, *arguments):
        if record.step == 6:
            if where == "in the middle of a file":
                blocks = rank_files.safetensors_blocks
                rank_files.safetensors_blocks = lambda *a: (_die() if i > 20 else b for i, b in enumerate(blocks(*a)))
            elif where == "before the record":
                saver_module.write_record = _die
            elif where == "before the rename":
                saver_module.fsync_directory = _die
            elif where == "before latest":
                saver_module.write_latest = _die
            elif where == "while an old one is deleted":
                folders.shutil = _DyingShutil
        begin(record, *arguments)

    saver.begin = armed


@pytest.mark.parametrize(
    "where, rank, expected",
    [
        ("in the middle of a file", 1, 3),
        pytest.param("in the middle of a file", 0, 3, marks=pytest.mark.slow),
        pytest.param("before the record", 0, 3, marks=pytest.mark.slow),
        ("before the rename", 0, 3),
        ("before latest", 0, 6),
        pytest.param("while an old one is deleted", 0, 6, marks=pytest.mark.slow),
    ],
)
def test_crash_safe_when_killed_in_a_save(pair, fresh_pair, shards, tmp_path, undisturbed, where, rank, expected):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 3, "keep_last": 1}, **WATCHED)
    with pytest.raises(WorkerError, match="died with exit code"):
        fresh_pair.run(told, config, _die_in_the_second_save, where, rank)
    assert folders.newest_complete(tmp_path / "run" / "checkpoints").name == f"step-{expected:08d}"
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param([1], id="one", marks=pytest.mark.slow),
        pytest.param([0], id="the first"),
        pytest.param([0, 1], id="all", marks=pytest.mark.slow),
    ],
)
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


def test_crash_safe_incomplete_checkpoints_are_named_and_skipped(pair, shards, tmp_path, undisturbed, caplog):
    folder = tmp_path / "run"
    config = tiny_config(shards, folder, **WATCHED)
    pair.run(run_and_stop_after, config, 3)
    pair.run(run_and_stop_after, config, 6)
    checkpoints = folder / "checkpoints"
    assert folders.saved_steps(checkpoints) == [6, 3]
    newest = checkpoints / "step-00000006"
    victim, record = newest / "rank-00001-of-00002.safetensors", newest / "COMPLETE.json"
    words = {victim: ("bytes, expected", "SHA-256 is not the recorded", "missing"), record: ("record",) * 3}
    for path in (victim, record):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for damage, word in zip((whole[:-4], flipped, None), words[path], strict=True):
            path.unlink() if damage is None else path.write_bytes(damage)
            caplog.clear()
            assert folders.newest_complete(checkpoints) == checkpoints / "step-00000003"
            assert "step-00000006 is incomplete and skipped" in caplog.messages[0]
            assert word in caplog.messages[0]
            with pytest.raises(UserError, match="requested, but incomplete"):
                folders.complete_at_step(checkpoints, 6)
        path.write_bytes(whole)
    assert folders.newest_complete(checkpoints) == newest
    victim.unlink()
    told = pair.run(error_of, config, 6)
    assert "requested, but incomplete" in told[0]
    assert "no such checkpoint; saved steps: 6, 3" in pair.run(error_of, config, 5)[0]
    assert len(metrics_of(folder)) > 0, "a refused start changes nothing"
    pair.run(run, config)
    assert_same(outcome_of(folder), undisturbed)


def test_crash_safe_a_damaged_latest_changes_nothing(pair, shards, tmp_path, undisturbed):
    config = tiny_config(shards, tmp_path / "run", **WATCHED)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    pair.run(run_and_stop_after, config, 3)
    latest.write_bytes(b"\xf3tep-00000003")
    pair.run(run_and_stop_after, config, 6)
    assert latest.read_text() == "step-00000006"
    latest.write_bytes(b"x" * 300)
    said = pair.run(told, config)[0]
    assert any("resuming after step 6" in line for line in said)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def test_crash_safe_never_means_a_silent_fresh_start(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000003" / "COMPLETE.json").unlink()
    assert "none of its checkpoints (3) is complete" in pair.run(error_of, config)[0]
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_weights(tmp_path / "run")
    shutil.rmtree(checkpoints / "step-00000003")
    assert "none of its checkpoints (3) is complete" in pair.run(error_of, config)[0]
    shutil.rmtree(checkpoints)
    before = outcome_files(tmp_path / "run")
    assert "none of its checkpoints (3) is complete" in pair.run(error_of, config)[0]
    assert outcome_files(tmp_path / "run") == before, "the logs are as they were"
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(WorkerError):
        pair.run(told, config, _break_at_step_2)
    said = pair.run(told, config)[0]
    assert f"{tmp_path / 'run'}: an earlier start saved no checkpoint; starting from the beginning" in said


def outcome_files(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.glob("*.jsonl")}


def _break_at_step_2(trainer: Trainer) -> None:
    step = trainer.engine.step

    def broken(at, *arguments):
        if at == 2:
            raise RuntimeError("broken on all ranks")
        return step(at, *arguments)

    trainer.engine.step = broken


def test_a_checkpoint_of_another_format_is_an_error_and_not_skipped(tmp_path):
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    (folder / "COMPLETE.json").write_text(json.dumps({"format": 99, "news": 1}))
    with pytest.raises(UserError, match="format 99, this version reads 2 and 3"):
        folders.newest_complete(tmp_path)


def test_going_on_from_an_earlier_step_sets_later_checkpoints_aside(pair, shards, tmp_path, undisturbed):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 4, "keep_last": 9}, **WATCHED)
    pair.run(run, config)
    checkpoints = tmp_path / "run" / "checkpoints"
    later = [s for s in folders.saved_steps(checkpoints) if s > 12]
    pair.run(run, config, 12)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)
    assert len(list(checkpoints.glob("set-aside-step-*"))) == len(later)
    last = checkpoints / f"set-aside-{folders.folder_of(checkpoints, max(later)).name}"
    last.rename(f"{last}-1")
    _set_aside_later_than(checkpoints, 12)
    assert last.is_dir() and (checkpoints / "latest").read_text() == folders.folder_of(checkpoints, 12).name


def _cannot_write_at(trainer: Trainer, steps: list[int]) -> None:
    """Lets the second rank find no room when it saves these steps: the kernel refuses to let a file grow."""
    saver = trainer.checkpoints.saver
    begin, wait_for_all = saver.begin, saver._wait_for_all
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trainer.processes.rank != 1:
        return

    def begin_short_of_room(record, *arguments):
        if record.step in steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        begin(record, *arguments)

    def wait_and_make_room(writing):
        wait_for_all(writing)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    saver.begin, saver._wait_for_all = begin_short_of_room, wait_and_make_room


def test_crash_safe_on_a_full_disk_the_run_lives_and_the_earlier_checkpoint_stays(pair, shards, tmp_path, undisturbed):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 3}, **WATCHED)
    said = [line for line in pair.run(told, config, _cannot_write_at, [6, 9])[0] if "WARNING" in line]
    assert len(said) == 2
    assert "the checkpoint of step 6 could not be written: rank 1:" in said[0]
    assert "File too large; the last one is that of step 3; free space or repair the disk; the run continues" in said[0]
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
    assert folders.newest_complete(tmp_path / "run" / "checkpoints").name == "step-00000020"
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
    record = folders.read_record(folder)
    record.files[victim.name] = {"bytes": victim.stat().st_size, "sha256": sha256(victim)}
    folders.write_record(folder, record)
    with pytest.raises(UserError, match="not a file of a checkpoint of this model"):
        open_weights(tmp_path / "run").read()
    assert "not a file of a checkpoint of this model" in pair.run(error_of, config)[0]
    assert not marker.exists()


def _unreadable_on_one_rank(processes: Processes, config) -> str:
    trainer = Trainer(config, processes)
    if processes.rank == 1:
        trainer.engine.read = _raise_io_error
    try:
        trainer.run()
    except UserError as error:
        return str(error)
    return "went on"


def _raise_io_error(*_) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "rank-00001-of-00002.safetensors")


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_crash_safe_one_rank_that_cannot_read_ends_all_with_one_error(pair, shards, tmp_path, zero_stage):
    config = tiny_config(shards, tmp_path / "run", deepspeed={"config": f"zero{zero_stage}"})
    pair.run(run_and_stop_after, config, 3)
    texts = pair.run(_unreadable_on_one_rank, config, timeout=30)
    problem = "rank-00001-of-00002.safetensors: Input/output error; fix that, or name another path"
    assert texts == [f"rank 1, host {host_name()}: {problem}"] * 2


def test_crash_safe_an_unreadable_checkpoint_is_not_taken_for_incomplete(pair, shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    monkeypatch.setattr(folders, "sha256", _raise_io_error)
    with pytest.raises(UserError, match="Input/output error; fix that, or remove this checkpoint"):
        folders.newest_complete(tmp_path / "run" / "checkpoints")


def _commit_twice(processes: Processes, folder: Path) -> list[str]:
    """Two savers at the same step, as of a run that was suspended between its last look and its commit."""
    fragments, kinds = [Fragment("w", 0, 4, 0, 0)], {"master": [torch.arange(4.0)]}
    record = CheckpointRecord(5, 0, 1, 2, "fp32", "", "", 5, ["master"], {"w": [4]})
    savers = [CheckpointSaver(folder, processes, token=token) for token in ("older", "newer")]
    for saver in savers:
        saver.begin(record, fragments, kinds)
    savers[1].finish()
    savers[0].finish()
    for saver in savers:
        saver.close()
    return sorted(path.name for path in folder.iterdir())


def test_crash_safe_a_late_commit_does_not_replace_a_complete_checkpoint(tmp_path):
    pool = WorkerPool(1)
    try:
        assert pool.run(_commit_twice, tmp_path) == [["latest", "step-00000005"]]
    finally:
        pool.stop()
    assert folders.find_problem(tmp_path / "step-00000005") is None


def test_crash_safe_killed_while_a_thread_writes(pair, fresh_pair, shards, tmp_path, undisturbed):
    keys = {**WATCHED, "checkpoint": {"every": 3, "keep_last": 1, "asynchronous": True}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    with pytest.raises(WorkerError, match="died with exit code"):
        fresh_pair.run(told, config, _die_in_the_second_save, "in the middle of a file", 1)
    assert folders.newest_complete(tmp_path / "run" / "checkpoints").name == "step-00000003"
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def _write_slowly(trainer: Trainer, seconds: float) -> None:
    """Lets rank 1 take so long for each of the first blocks of a file."""
    blocks = rank_files.safetensors_blocks

    def slow(*arguments):
        for number, block in enumerate(blocks(*arguments)):
            if trainer.processes.rank == 1 and number < 12:
                time.sleep(seconds)
            yield block

    patcher = patch.object(rank_files, "safetensors_blocks", slow)
    patcher.start()
    trainer._resources.callback(patcher.stop)


def test_a_long_save_is_no_stall_as_long_as_it_makes_progress(pair, shards, tmp_path):
    keys = {"schedule": {"patch_sides": [2, 1], "epochs": 2}, "validation": {"every": 0}}
    config = tiny_config(shards, tmp_path / "run", watch={"stall_seconds": 3}, **keys)
    pair.run(told, config, _write_slowly, 0.5)
    saves = [e for e in read_events(tmp_path / "run" / "metrics.jsonl") if e["event"] == "checkpoint"]
    assert all(e["seconds"] > 5 for e in saves), "longer than what would be a stall"


def test_training_goes_on_while_a_thread_writes(pair, shards, tmp_path):
    keys = {"schedule": {"patch_sides": [2, 1], "epochs": 4}, "validation": {"every": 0}, "logging": {"every": 1}}
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 0, "asynchronous": True}, **keys)
    pair.run(told, config, _write_slowly, 0.05)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    place = next(i for i, e in enumerate(events) if e["event"] == "checkpoint")
    assert events[place]["step"] == 20
    assert events[place - 1]["step"] > 20, "later steps were told before it was complete"
    assert events[place]["seconds"] < 12 * 0.05, "less than it took to write"


def test_a_screen_that_takes_nothing_is_no_reason_to_stop(shards, tmp_path):
    keys = {"schedule": {"patch_sides": [2, 1], "epochs": 2}, "validation": {"every": 0}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    with Launch(config, 1, output=Path("/dev/full"), forked=False) as launch:
        assert launch.exit_codes() == [0]
    assert folders.newest_complete(tmp_path / "run" / "checkpoints").name == "step-00000020"


def _break_monitor(trainer: Trainer) -> None:
    if trainer.engine.monitor:
        trainer.engine.monitor.write_events = _raise_io_error


def test_a_monitor_that_fails_is_given_up(pair, shards, tmp_path):
    keys = {"schedule": {"patch_sides": [2, 1], "epochs": 2}, "validation": {"every": 0}}
    pair.run(
        told, tiny_config(shards, tmp_path / "run", logging={"every": 1, "monitors": ["csv"]}, **keys), _break_monitor
    )
    assert folders.newest_complete(tmp_path / "run" / "checkpoints").name == "step-00000020"
