"""A process reads its rank and the rendezvous address from its launcher, and reports peers that do not arrive."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from launches import Launch
from npp_ds.distributed import process_group
from npp_ds.distributed.environment import ProcessInfo, read_environment, rendezvous_port, srun_rendezvous
from npp_ds.errors import RendezvousError, UserError
from npp_ds.training.preemption import PREEMPTED
from runs import tiny_config
from workers import free_port

ROOT = Path(__file__).parents[2]
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16", "SLURM_NODEID": "0"}
TASK = {
    **BATCH, "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, ProcessInfo()),
        (TORCHRUN, ProcessInfo(1, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ProcessInfo(1, 0, 2)),
        (TASK, ProcessInfo(11, 3, 12)),
        (TASK | TORCHRUN, ProcessInfo(1, 1, 2)),  # torchrun in a task of srun
        (BATCH, ProcessInfo()),  # a batch script is one process, whatever SLURM_NTASKS says
        ({"WORLD_SIZE": "2"}, ProcessInfo()),
    ],
)
def test_ranks_are_the_launchers_before_sruns_and_a_batch_script_is_alone(environment, expected):
    assert read_environment(environment) == expected


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_named(name):
    with pytest.raises(UserError, match=f"{name}: found 'two', expected a whole number"):
        read_environment(TORCHRUN | {name: "two"})


def test_tasks_of_one_node_meet_there_and_tasks_of_several_need_an_address():
    port = {"MASTER_PORT": str(rendezvous_port(7, 2, 0))}
    assert srun_rendezvous(TASK | {"MASTER_ADDR": "gpu08"}) == port
    assert srun_rendezvous(TASK | {"SLURM_STEP_NUM_NODES": "1"}) == {"MASTER_ADDR": "127.0.0.1", **port}
    assert srun_rendezvous(TASK | {"MASTER_ADDR": "gpu08", "MASTER_PORT": "1"}) == {}
    assert srun_rendezvous(TASK | TORCHRUN) == srun_rendezvous(BATCH) == srun_rendezvous({}) == {}
    with pytest.raises(UserError, match=r"MASTER_ADDR: not set for a step on 2 nodes.*scontrol show hostnames"):
        srun_rendezvous(TASK)


def test_jobs_steps_and_restarts_that_may_share_a_node_have_ports_of_their_own():
    ports = {rendezvous_port(job, step, restart) for job in range(900, 1100) for step in range(6) for restart in (0, 6)}
    assert len(ports) == 200 * 12
    assert min(ports) >= 10_000 and max(ports) < 30_000
    assert 10_000 <= rendezvous_port(2**26, 4000, 99) < 30_000


@pytest.fixture
def no_launcher(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "MASTER_")) or name in TORCHRUN]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_training_in_a_batch_script_without_srun_is_refused(no_launcher):
    for name, value in BATCH.items():
        no_launcher.setenv(name, value)
    with pytest.raises(UserError, match=r"has 16 tasks, but this process is none of them.*srun"):
        process_group.join_processes()


@pytest.mark.parametrize(
    "local_rank, visible, on_node, gpu",
    [(3, 8, "", 3), (3, 8, "8", 3), (3, 1, "8", 0), (3, 1, "", None), (1, 1, "1", None), (8, 8, "8", None)],
)
def test_a_process_takes_the_gpu_of_its_number_or_the_only_one_that_slurm_shows_it(
    no_launcher, local_rank, visible, on_node, gpu
):
    no_launcher.setenv("SLURM_GPUS_ON_NODE", on_node)
    if gpu is not None:
        assert process_group._gpu_of(local_rank, visible) == gpu
        return
    with pytest.raises(UserError, match=f"local rank {local_rank} has no GPU of its own: {visible} visible"):
        process_group._gpu_of(local_rank, visible)


def test_a_rendezvous_that_fails_names_rank_and_address(no_launcher):
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        no_launcher.setenv(name, value)
    with pytest.raises(RendezvousError, match=rf"rank 0 on \S+ did not meet all 2 processes at 127\.0\.0\.1:{port} "):
        process_group._rendezvous(ProcessInfo(0, 0, 2), timedelta(seconds=1), timedelta(minutes=1), lambda: None)


@pytest.mark.parametrize("rank, number", [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_process_that_waits_for_the_others_answers_signals(tmp_path, rank, number):
    (tmp_path / "train").mkdir()
    config = tiny_config(tmp_path, tmp_path / "run")
    with Launch(config, 2, forked=False) as launch:
        launch.processes[1 - rank].kill()  # it never arrives
        launch.processes[1 - rank].wait()
        launch.wait_for_imports(rank)
        launch.send(rank, signal.SIGUSR1)  # alone it ends nothing here: the others may not have received it
        launch.send(rank, number)
        launch.processes[rank].wait(20)
        assert launch.processes[rank].returncode == PREEMPTED, launch.text()


@pytest.mark.parametrize(
    "error, rank, code, said",
    [
        ("UserError('bad')", 1, 2, "error (rank 1, host n2): bad\n"),
        ("UserError('bad')", 0, 2, "error (rank 0, host n2): bad\n"),
        ("UserError('bad', on_all_ranks=True)", 0, 2, "error: bad\n"),
        ("UserError('bad', on_all_ranks=True)", 1, 2, ""),
        ("RendezvousError('nobody came')", 1, 1, "error: nobody came\n"),
        (
            "RuntimeError('Connection closed by peer')", 1, 1,
            "error (rank 1, host n2): lost the connection to another process of this launch (Connection closed by "
            "peer): it has ended or cannot be reached; its own messages say why\n",
        ),
        (
            "OSError(28, 'No space left on device')", 1, 2,
            "error (rank 1, host n2): No space left on device; fix that, or name another path\n",
        ),
        (
            "MemoryError()", 1, 2,
            "error (rank 1, host n2): out of memory: MemoryError; use a smaller batch or model, or more memory\n",
        ),
        ("RuntimeError('broken')", 1, 1, "[rank 1, host n2] RuntimeError: broken\n"),
        ("OSError(9, 'Bad file descriptor')", 1, 1, "[rank 1, host n2] OSError: [Errno 9] Bad file descriptor\n"),
    ],
)  # fmt: skip
def test_errors_among_several_processes_begin_with_rank_and_host(error, rank, code, said):
    program = f"""
from npp_ds import cli
from npp_ds.errors import RendezvousError, UserError
def app():
    raise {error}
cli.app = app
cli.main()"""
    environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "SLURMD_NODENAME": "n2"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert done.stderr.endswith(said) if said.startswith("[") else done.stderr == said
    assert all(line.startswith("[rank 1, host n2] ") for line in done.stderr.splitlines()) or "broken" not in error


def test_a_script_of_several_processes_prints_its_errors_as_npp_does(tmp_path):
    command = [sys.executable, ROOT / "data_prep/tokenize_imagenet.py", "--images", tmp_path / "nowhere"]
    command += ["--out", tmp_path / "codes", "--tokenizer", "fashion_mnist", "--device", "cpu"]
    environment = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "SLURMD_NODENAME": "n2"}
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error (rank 1, host n2): ") and f"{tmp_path}/nowhere" in done.stderr
