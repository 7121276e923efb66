"""Two runs on one folder: the second is refused while the first lives, and whoever lost the folder commits nothing."""

import os
import signal
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from launches import Launch, finish
from npp_ds.checkpoint import folders
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.training import run_folder
from npp_ds.training.lease import Lease
from npp_ds.training.trainer import Trainer
from runs import WATCHED, assert_same, error_of, outcome_of, run, tiny_config

pytestmark = pytest.mark.processes


def test_a_second_run_on_the_folder_is_refused_and_after_a_kill_the_next_one_goes_on(shards, tmp_path):
    keys = {"schedule": {"patch_sides": [2, 1], "epochs": 400}, "checkpoint": {"every": 5}, "validation": {"every": 0}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    with Launch(config, 1) as first:
        first.wait_until_step(10)
        with Launch(config, 1) as second:
            assert second.exit_codes(timeout=90) == [2]
            assert "another run trains in this folder" in second.text()
            assert f"pid {first.processes[0].pid}" in second.text()
        step = first.last_step()
        first.wait_until_step(step + 5)
        assert first.processes[0].poll() is None, "the first one is not disturbed"
        first.send(0, signal.SIGKILL)
        first.exit_codes()
    began = time.monotonic()
    with Launch(config, 1) as third:
        third.wait_until_step(step + 10)
        assert time.monotonic() - began < 60, "a dead holder of this host is not waited for"
        third.send(0, signal.SIGTERM)
        assert third.exit_codes() == [75]


def _taken_over_before(processes: Processes, config, moment: str) -> tuple[str, bool]:
    """What the older holder says when a requeued job on another node takes its folder, and whether it saved no more."""
    os.environ.update(SLURM_JOB_ID="77", SLURM_RESTART_COUNT="0")
    try:
        trainer = Trainer(config, processes)
    finally:
        del os.environ["SLURM_JOB_ID"], os.environ["SLURM_RESTART_COUNT"]
    saver = trainer.checkpoints.saver
    begin, step = saver.begin, trainer.engine.step
    newer = Lease(config.directory, host="elsewhere", job_id="77", restart_count=1, heartbeat_seconds=0.2)

    def take(*_):
        if processes.is_first:
            newer.acquire()

    def watched_begin(record, *arguments):
        if record.step == 6 and moment == "a commit":
            take()
        begin(record, *arguments)

    def watched_step(at, *arguments):
        if at == 4 and moment == "a step":
            take()
            time.sleep(6)  # more than a heartbeat
        assert at < 6, "goes on training"
        return step(at, *arguments)

    saver.begin, trainer.engine.step = watched_begin, watched_step
    try:
        trainer.run()
    except UserError as error:
        newer.release()
        return str(error), folders.saved_steps(config.directory / "checkpoints") == [3]
    return "went on", False


@pytest.mark.parametrize("moment", ["a commit", "a step"])
def test_the_older_holder_stops_before_it_commits_anything(pair, shards, tmp_path, undisturbed, moment):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 3}, **WATCHED)
    for text, nothing_more in pair.run(_taken_over_before, config, moment):
        assert "another start has taken over this run folder" in text
        assert "job 77" in text
        assert nothing_more
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def test_a_run_folder_that_cannot_be_written_is_one_error_on_all_ranks(pair, shards, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        told = pair.run(error_of, tiny_config(shards, place))
        assert told[0] == told[1]
        assert str(place) in told[0] or str(tmp_path / "file") in told[0]


def test_a_finished_run_gives_its_folder_back(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", schedule={"patch_sides": [2, 1], "epochs": 2})
    finish(config, 1)
    began = time.monotonic()
    Lease(config.directory, host="elsewhere").acquire()
    assert time.monotonic() - began < 2


def _with_a_folder_of_its_own(processes: Processes, config, elsewhere: Path) -> str:
    """Rank 1 sees another folder under the name of the run folder, as on a node that does not share it."""
    if processes.rank == 1:
        config = config.model_copy(update={"run_dir": str(elsewhere)})
    check = run_folder.check_shared
    with patch.object(run_folder, "check_shared", lambda run_dir, token: check(run_dir, token, patience=1.0)):
        return error_of(processes, config)


def test_processes_that_do_not_share_the_run_folder_are_refused(pair, shards, tmp_path):
    texts = pair.run(_with_a_folder_of_its_own, tiny_config(shards, tmp_path / "run"), tmp_path / "elsewhere")
    assert texts[0] == texts[1]
    assert "elsewhere/lease.json" in texts[0]
    assert "not that of the first process" in texts[0]
