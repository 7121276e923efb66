"""Ctrl-C, SIGTERM or SIGUSR1 to any one process: all stop after the same step with one checkpoint and exit code 75."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from unittest.mock import patch

import pytest

from launches import Launch, finish, last_step
from npp_ds.checkpoint import folders
from npp_ds.distributed.process_group import Processes
from npp_ds.training.hooks import Context
from npp_ds.training.preemption import Preempted
from npp_ds.training.trainer import Trainer
from runs import WATCHED, assert_same, metrics_of, outcome_of, run, tiny_config

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    "rank, first, second",
    [(1, signal.SIGTERM, None), (0, signal.SIGUSR1, signal.SIGTERM), (1, signal.SIGINT, signal.SIGUSR1)],
)
def test_preemptible_all_stop_after_one_step_with_one_checkpoint(shards, tmp_path, rank, first, second):
    keys = {"schedule": {"patch_sides": [2, 1], "epochs": 400}, "validation": {"every": 0}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    with Launch(config) as launch:
        launch.wait_until_step(5)
        began = time.monotonic()
        launch.send(rank, first)
        step = launch.last_step()
        if second:
            launch.send(1 - rank, second)
            launch.send(rank, second)
        codes = launch.exit_codes(timeout=60)
        seconds = time.monotonic() - began
    assert codes == [75, 75], launch.text()
    (saved,) = folders.saved_steps(tmp_path / "run" / "checkpoints")
    assert f"{saved} of 4000; rerun the same command to resume" in launch.text()
    assert step <= saved <= step + 20, "the signal's delivery aside, the step that was being made"
    assert saved < 2000, "far from the end of a stage"
    assert seconds < 30
    assert metrics_of(tmp_path / "run")[-1]["step"] == saved


@pytest.mark.slow
def test_preemptible_by_ctrl_c_under_torchrun(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", schedule={"epochs": 400}, validation={"every": 0})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "npp_ds", "train", "--config", str(tmp_path / "run.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True, env=env) as torchrun:
        guard = threading.Timer(120, torchrun.kill)
        guard.start()
        try:
            while last_step(tmp_path / "run") < 3 and torchrun.poll() is None:
                time.sleep(0.1)
            torchrun.send_signal(signal.SIGINT)
            text = torchrun.communicate()[0]
        finally:
            guard.cancel()
            torchrun.kill()
    (saved,) = folders.saved_steps(tmp_path / "run" / "checkpoints")
    assert f"SIGINT: saved after step {saved} of 4000; rerun the same command to resume" in text, text


def _asked_at(processes: Processes, config, step: int) -> int:
    """The step after which the run stopped, asked on rank 1 in the middle of `step`."""
    trainer = Trainer(config, processes)
    train = trainer.engine.step

    def asked(at, *arguments):
        if at == step and processes.rank == 1:
            trainer.stop.requested = "SIGTERM"
        return train(at, *arguments)

    trainer.engine.step = asked
    try:
        trainer.run()
    except Preempted as stop:
        return stop.step
    return -1


@pytest.mark.parametrize("step", [0, 6, 9, 12])
def test_preemptible_the_step_that_was_asked_in_is_the_last_and_the_run_goes_on_exactly(
    pair, shards, tmp_path, undisturbed, step
):
    config = tiny_config(shards, tmp_path / "run", **WATCHED)
    assert pair.run(_asked_at, config, step) == [step + 1] * 2
    assert folders.newest_complete(tmp_path / "run" / "checkpoints").name == f"step-{step + 1:08d}"
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def test_preemptible_from_the_imports_on_and_however_often_it_is_asked(shards, tmp_path, undisturbed):
    config = tiny_config(shards, tmp_path / "run", **WATCHED)
    with Launch(config, forked=False) as launch:
        launch.wait_for_imports(1)
        launch.send(1, signal.SIGUSR1)
        _wait(lambda: "stopped before the first step" in launch.text(), launch)
        while any(process.poll() is None for process in launch.processes):
            launch.send(0, signal.SIGTERM)
            launch.send(1, signal.SIGTERM)
            time.sleep(0.02)
        assert launch.exit_codes() == [75, 75], launch.text()
    assert not folders.saved_steps(tmp_path / "run" / "checkpoints"), "there was nothing to save"
    finish(config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def _wait(condition: Callable[[], bool], launch: Launch, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, launch.text()
        assert all(process.poll() is None for process in launch.processes), launch.text()
        time.sleep(0.002)


def _asked_in_a_validation(processes: Processes, config, at: int) -> tuple[int, int]:
    """(step after which the run stopped, validation batches that were still computed)."""
    trainer = Trainer(config, processes)
    batches = [0]
    check_stop = Context.check_stop

    def counted(context):
        batches[0] += 1
        if batches[0] == at and processes.rank == 1:
            trainer.stop.requested = "SIGUSR1"
        check_stop(context)

    try:
        with patch.object(Context, "check_stop", counted):
            trainer.run()
    except Preempted as stop:
        return stop.step, batches[0] - at
    return -1, -1


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("at, step", [(2, 7), (17, 10)], ids=["where no checkpoint is due", "where one is due"])
def test_preemptible_in_the_middle_of_a_validation(pair, shards, tmp_path, undisturbed, at, step, asynchronous):
    keys = {**WATCHED, "checkpoint": {"asynchronous": asynchronous}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    assert pair.run(_asked_in_a_validation, config, at) == [(step, 0)] * 2
    assert folders.newest_complete(tmp_path / "run" / "checkpoints").name == f"step-{step:08d}"
    assert not any(m["step"] == step and "validation" in m["event"] for m in metrics_of(tmp_path / "run"))
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)
