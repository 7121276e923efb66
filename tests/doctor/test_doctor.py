"""`npp doctor` finds what would stop a run, names the node, reports it once, ends in time and leaves nothing behind."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

from npp_ds.config.load import load_config
from npp_ds.data.manifest import Manifest
from npp_ds.distributed.process_group import Processes
from npp_ds.doctor import collectives, runner
from npp_ds.doctor.checks import FAILURE, OK, WARNING, Check, Context, Result, row_of
from npp_ds.doctor.collectives import temporary_folder
from npp_ds.doctor.local import (
    CHECKS_OF_RUN,
    checkpoint_bytes,
    checkpoint_space,
    cores,
    gpu,
    gpu_memory,
    missing_gpu,
    most_checkpoints,
    software,
    staging,
    world_size,
)
from npp_ds.doctor.runner import Request, Runner, StoreExchange
from npp_ds.errors import RendezvousError
from npp_ds.training.engine import TrainingEngine, initial_model
from runs import shards_in, tiny_config
from shard_sets import write_set
from workers import free_port

CHECK_WEIGHTS = next(check for check in CHECKS_OF_RUN if check.name == "weights")
Usage = namedtuple("Usage", "total used free")


def checked(processes: Processes, *overrides: str, file: Path | None = None, step=False, patches=()) -> tuple:
    """(exit code, standard output, standard error) of a doctor to whom each rank is a node, n0, n1, ..

    {node} in an override is the node's name; `patches` are (rank or None for all, target, attributes).
    """
    node = f"n{processes.rank}"
    request = Request(None, file, tuple(o.replace("{node}", node) for o in overrides), step)
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, SLURMD_NODENAME=node))
        for rank, target, attributes in patches:
            if rank in (None, processes.rank):
                stack.enter_context(patch.multiple(target, **attributes))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        code = Runner(request, processes).run(0.0)
    return code, out.getvalue(), err.getvalue()


def file_of(config, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.fixture
def config_file(shards, tmp_path) -> Path:
    config = tiny_config(shards, tmp_path / "runs" / "run", data={"cache_dir": str(tmp_path / "cache" / "npp")})
    return file_of(config, tmp_path)


def rows_of(text: str) -> dict[str, tuple[str, str]]:
    """{check: (result, detail)} of the plain table."""
    header, *lines = text.splitlines()
    at, then = header.index("result"), header.index("detail")
    return {line[:at].strip(): (line[at:then].strip(), line[then:]) for line in lines if line[at - 2 : at] == "  "}


def alone(config=None, nodes=("n0",), device="cpu") -> Context:
    return Context(Processes(0, 0, len(nodes), torch.device(device)), list(nodes), config)


def test_the_first_process_reports_that_all_is_well_and_nothing_stays_behind(pair, config_file, tmp_path):
    (code, out, err), other = pair.run(checked, file=config_file)
    assert (code, err) == (0, "")
    assert out.endswith("all checks passed: 2 processes on 2 nodes\n")
    assert other == (0, "", "")
    rows = rows_of(out)
    assert {state for state, _ in rows.values()} == {OK}
    assert rows["all-reduce"][1] == "right in float32, int64, float64 over gloo"
    assert rows["run folder"][1] == f"{tmp_path}/runs/run: seen and written by all nodes, with locks"
    assert "side 4: 10 steps of 16 images (8 at a time)" in rows["settings"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_folder_is_left_as_it_was(pair, config_file, tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("kept\n")
    (code, out, _), _ = pair.run(checked, file=config_file)
    assert code == 0, out
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_without_a_run_only_the_machine_is_checked(pair):
    (code, out, _), _ = pair.run(checked)
    assert code == 0
    assert list(rows_of(out)) == [
        "processes", "world size", "software", "GPUs", "cores", "all-reduce", "speed",
    ]  # fmt: skip


def _sets_of_two_nodes(shards: Path, tmp_path: Path) -> list[str]:
    for node in ("n0", "n1"):
        shutil.copytree(shards / "train", tmp_path / node / "train")
    return [f"data.train={tmp_path}/$SLURMD_NODENAME/train"]


def test_each_node_may_have_its_own_copy_of_the_shards(pair, config_file, shards, tmp_path):
    (code, out, err), _ = pair.run(checked, *_sets_of_two_nodes(shards, tmp_path), file=config_file)
    assert (code, err) == (0, "")
    assert rows_of(out)["shards"][1].startswith(f"{tmp_path}/n0/train: 160 images")


def test_a_node_without_a_shard_is_named_and_nobody_waits(pair, config_file, shards, tmp_path):
    overrides = _sets_of_two_nodes(shards, tmp_path)
    gone = tmp_path / "n1" / "train" / "train-000001.tar"
    gone.unlink()
    (code, out, err), other = pair.run(checked, *overrides, file=config_file)
    assert (code, other) == (2, (2, "", ""))
    assert err.startswith(f"error: host n1 (rank 1): shards: {gone}: No such file or directory")
    assert err.count("\n") == 1
    rows = rows_of(out)
    assert rows["shards"][0] == FAILURE
    assert rows["shards"][1].startswith(f"n1: {gone}: ")
    assert rows["all-reduce"] == ("not run", "skipped; fix the failures above first")


def test_a_shard_of_another_size_or_content_is_found(pair, config_file, shards, tmp_path):
    overrides = _sets_of_two_nodes(shards, tmp_path)
    path = tmp_path / "n1" / "train" / "train-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    (code, _, err), _ = pair.run(checked, *overrides, file=config_file)
    assert code == 2
    assert f"host n1 (rank 1): shards: {path}: {len(whole) - 512:,} bytes, expected {len(whole):,}" in err
    path.write_bytes(b"x" * len(whole))
    (code, _, err), _ = pair.run(checked, *overrides, file=config_file)
    assert code == 2
    assert f"host n1 (rank 1): shards: {path}: damaged" in err


def test_nodes_that_see_different_sets_are_found(pair, config_file, shards, tmp_path):
    overrides = _sets_of_two_nodes(shards, tmp_path)
    shutil.rmtree(tmp_path / "n1")
    write_set(tmp_path / "n1" / "train", 160, 2, seed=9)
    ours, theirs = (Manifest.load(tmp_path / n / "train").fingerprint()[:12] for n in ("n0", "n1"))
    (code, out, err), _ = pair.run(checked, *overrides, file=config_file)
    assert code == 2
    assert err.startswith(f"error: host n1 (rank 1): shards: manifests {theirs}, ")
    assert ours in err
    assert " on n0; make it the same on all nodes" in rows_of(out)["shards"][1]


def test_a_world_size_that_does_not_divide_the_batch_is_reported_once(pair, config_file):
    (code, _, err), other = pair.run(checked, "schedule.batch_size=15", file=config_file)
    assert (code, other) == (2, (2, "", ""))
    assert err == (
        "error: host n0 (rank 0): settings: schedule.batch_size: 15 (every stage) is not a multiple of 2 processes; "
        "use 16, or another number of processes\n"
    )


def test_a_wrong_key_is_reported_once(pair, config_file):
    (code, _, err), other = pair.run(checked, "schedule.epocs=3", file=config_file)
    assert (code, other) == (2, (2, "", ""))
    assert err.startswith("error: host n0 (rank 0): config: 1 problem")
    assert "schedule.epocs: unknown key, did you mean schedule.epochs?" in err


def test_a_run_folder_that_is_not_shared_is_found(pair, config_file, tmp_path):
    impatient = [(None, "npp_ds.doctor.collectives", {"SHARED_FOLDER_TIMEOUT_SECONDS": 0.0})]
    (code, _, err), _ = pair.run(checked, f"run_dir={tmp_path}/{{node}}/run", file=config_file, patches=impatient)
    assert code == 1
    assert err.startswith(f"error: host n1 (rank 1): run folder: {tmp_path}/n1/run/.doctor-")
    assert "one run folder: set run_dir" in err
    assert not (tmp_path / "n0").exists()
    assert not (tmp_path / "n1").exists()


@contextmanager
def _no_locks(path, patience):
    yield False


@contextmanager
def _locks_of_one_node(path, patience):
    yield True


@pytest.mark.parametrize(
    "locks, said",
    [(_no_locks, "its file system has no locks"), (_locks_of_one_node, "locks do not reach from")],
)
def test_a_run_folder_without_locks_between_nodes_is_a_warning(pair, config_file, tmp_path, locks, said):
    patches = [(None, "npp_ds.doctor.collectives", {"locked": locks})]
    (code, out, _), _ = pair.run(checked, file=config_file, patches=patches)
    assert code == 0
    state, detail = rows_of(out)["run folder"]
    assert state == WARNING
    assert f"{tmp_path}/runs/run: shared, but {said}" in detail
    assert out.endswith("1 warning, nothing that stops a run: 2 processes on 2 nodes\n")


@pytest.mark.parametrize("nodes, milliseconds, state", [(2, 40, WARNING), (2, 30, OK), (1, 40, OK)])
def test_a_slow_network_between_nodes_with_gpus_is_a_warning(monkeypatch, nodes, milliseconds, state):
    """Between two processes 64 MiB in 33.6 ms are 2 GB/s on the bus."""
    context = alone(device="cuda", nodes=[f"n{rank * (nodes - 1)}" for rank in range(2)])
    monkeypatch.setattr(torch, "ones", lambda size, device: None)
    monkeypatch.setattr(collectives, "_seconds_of", lambda context, action: milliseconds / 1e3)
    found = collectives.speed(context)
    assert found.state == state
    assert f"67.1 MB in {milliseconds}.0 ms" in found.detail


def test_a_run_folder_that_cannot_be_made_is_found(pair, config_file, tmp_path):
    (tmp_path / "file").write_text("")
    (code, _, err), _ = pair.run(checked, f"run_dir={tmp_path}/file/run", file=config_file)
    assert code == 2
    assert f"{tmp_path}/file" in err
    assert "Not a directory" in err


def _checked_with_broken_cores(processes: Processes, file: Path, *overrides: str) -> tuple:
    def broken(pid):
        raise ZeroDivisionError("affinity")

    return checked(processes, *overrides, file=file, patches=[(1, os, {"sched_getaffinity": broken})])


def test_a_check_that_breaks_on_one_process_is_a_finding_that_another_start_may_not_have(pair, config_file):
    (code, _, err), other = pair.run(_checked_with_broken_cores, config_file)
    assert (code, other) == (1, (1, "", ""))
    assert err == "error: host n1 (rank 1): cores: ZeroDivisionError: affinity\n"


def test_what_the_user_must_fix_decides_the_exit_code_and_is_in_the_last_line(pair, config_file):
    (code, _, err), other = pair.run(_checked_with_broken_cores, config_file, "schedule.batch_size=15")
    assert (code, other[0]) == (2, 2)
    assert err.startswith("error: host n0 (rank 0): settings: schedule.batch_size: 15")
    assert err.endswith(" (and 1 more failure above)\n")


def _checked_with_lost_connection(processes: Processes, file: Path) -> tuple:
    def lost(tensor):
        raise torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error")

    patches = [(None, "npp_ds.doctor.collectives.dist", {"all_reduce": lost})]
    return checked(processes, file=file, step=True, patches=patches)


def test_an_all_reduce_that_breaks_may_do_better_at_another_start(pair, config_file):
    (code, out, err), other = pair.run(_checked_with_lost_connection, config_file)
    assert (code, other) == (1, (1, "", ""))
    assert err.startswith("error: host n0 (rank 0): all-reduce: lost the connection to another process of this launch")
    assert "NCCL error" in err
    assert {name: state for name, (state, _) in rows_of(out).items() if state != OK} == {
        "all-reduce": FAILURE, "speed": "not run", "run folder": "not run",
    }  # fmt: skip


def _checked_with_a_silent_one(processes: Processes) -> tuple:
    if processes.rank == 1:  # answers the first question and no more
        StoreExchange(processes).gather("n1")
        return ()
    return checked(processes, patches=[(0, runner, {"RENDEZVOUS_TIMEOUT": timedelta(seconds=0.3)})])


def test_a_silent_process_is_named_and_another_start_may_do_better(pair):
    code, out, err = pair.run(_checked_with_a_silent_one)[0]
    assert code == 1
    assert rows_of(out)["all-reduce"][0] == "not run"
    assert err == "error: host n1 (rank 1): cores: no answer within 0.3 s: it has died or hangs\n"


def _collected(processes: Processes) -> list:
    exchange = StoreExchange(processes)
    return exchange.gather("here", timeout=0.3) if processes.is_first else []


def test_a_process_that_is_silent_is_not_waited_for(pair):
    assert pair.run(_collected)[0] == ["here", None]


def test_a_step_is_made_at_each_patch_side(pair, config_file, tmp_path):
    (code, out, err), _ = pair.run(checked, "logging.monitors=[csv]", file=config_file, step=True)
    assert code == 0, out + err
    rows = rows_of(out)
    assert [name for name in rows if name.startswith("step")] == ["step, side 4", "step, side 2", "step, side 1"]
    assert "for 16 images, 8 images at a time" in rows["step, side 1"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def _checked_out_of_memory(processes: Processes, file: Path) -> tuple:
    def step(engine, number, micro_batches, rate):
        if micro_batches[0][0].shape[2] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(engine, number, micro_batches, rate)

    original = TrainingEngine.step
    return checked(processes, file=file, step=True, patches=[(None, TrainingEngine, {"step": step})])


def test_a_step_that_does_not_fit_names_side_and_what_to_change(pair, config_file):
    (code, out, err), _ = pair.run(_checked_out_of_memory, config_file)
    assert code == 2
    assert rows_of(out)["step, side 2"][0] == OK
    assert err.startswith("error: host n0 (rank 0): step, side 1: out of memory")
    assert "at patch side 1 with 8 images at a time; lower schedule.micro_batch_size" in err


def test_tasks_of_slurm_that_are_not_all_there_are_a_failure(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert world_size(alone(nodes=("n0", "n1"))).state == OK
    one_node = world_size(alone(nodes=("n0", "n0")))
    assert (one_node.state, one_node.permanent) == (FAILURE, True)
    assert one_node.detail.startswith("2 processes on 1 node, but SLURM says 2 nodes")
    one = world_size(alone())
    assert one.detail.startswith("1 process on 1 node, but SLURM says 2 tasks and 2 nodes")


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "CROSS_SIZE"])
def test_processes_of_a_launcher_are_not_counted_against_tasks(monkeypatch, variable):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert world_size(alone(nodes=("n0", "n0"))).state == FAILURE
    monkeypatch.setenv(variable, "1")
    assert world_size(alone(nodes=("n0", "n0"))).detail == "2 processes on 1 node, not started by srun"


def test_a_gpu_that_slurm_gave_and_torch_does_not_see_is_missed(monkeypatch):
    assert missing_gpu(0) is None
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert missing_gpu(0).startswith("SLURM gave 4 GPUs and torch sees 0 (")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert missing_gpu(2) is None
    assert missing_gpu(3).startswith("SLURM gave 4 GPUs and torch sees 3 (")
    assert missing_gpu(4) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each its own
    assert missing_gpu(3) is None


def test_fewer_processes_than_gpus_and_a_gpu_in_use_are_warnings(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert gpu(alone(device="cuda", nodes=("n0", "n0"))).state == OK
    found = gpu(alone(device="cuda", nodes=("n0", "n1")))
    assert found.state == WARNING
    assert "2 GPUs and 1 process on this node" in found.detail
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 10**9, 80 * 10**9))
    assert gpu_memory(alone(device="cuda")).state == OK
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 10**9, 80 * 10**9))
    found = gpu_memory(alone(device="cuda"))
    assert found.state == WARNING
    assert found.detail.startswith("GPU 0: 20.0 GB of 80.0 GB are in use")


def test_a_deepspeed_that_cannot_be_imported_is_a_failure(monkeypatch):
    found = software(alone())
    assert found.state == OK
    assert f"torch {torch.__version__}" in found.common
    assert "deepspeed 0." in found.common
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    found = software(alone())
    assert found.state == FAILURE
    assert found.detail.startswith("deepspeed cannot be imported: ModuleNotFoundError")


def test_fewer_cores_than_slurm_promised_are_a_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert cores(alone()).state == OK
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    found = cores(alone())
    assert found.state == WARNING
    assert "2 usable, SLURM_CPUS_PER_TASK=8" in found.detail
    assert "SRUN_CPUS_PER_TASK" in found.detail
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert cores(alone()).state == OK
    assert cores(alone(device="cuda")).state == WARNING


def test_checkpoints_are_counted_as_a_run_keeps_them():
    config = load_config("xxl_256", overrides=["data.train=x"])
    assert checkpoint_bytes(config) == config.model.parameters() * 12
    average = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"ema_decay": 0.9})})
    assert checkpoint_bytes(average) == config.model.parameters() * 16
    schedule = config.build_schedule(10_000)  # 39 steps an epoch: stages end after 5850 and 11700
    every = config.checkpoint.model_copy(update={"every": 1000, "keep_last": 3})
    assert most_checkpoints(schedule, every) == 3 + 2 + 1
    assert most_checkpoints(schedule, every.model_copy(update={"keep_every": 2000})) == 3 + 2 + 5 + 1
    assert most_checkpoints(schedule, every.model_copy(update={"every": 0})) == 2  # one at the end of each stage


@pytest.mark.parametrize("free, fresh, resumed", [(0.9, FAILURE, WARNING), (1.1, WARNING, OK), (3.1, OK, OK)])
def test_disks_without_room_for_checkpoints_stop_fresh_runs_alone(shards, tmp_path, monkeypatch, free, fresh, resumed):
    config = tiny_config(shards, tmp_path / "run")  # saves at the ends of its three stages
    size = config.model.parameters() * 12
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(free * size)))
    found = checkpoint_space(alone(config))
    assert found.state == fresh
    assert "3 at most, 0 saved" in found.detail

    def save(step: int) -> None:
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    save(10)
    save(20)
    assert checkpoint_space(alone(config)).state == resumed
    save(alone(config).schedule.total_steps)
    assert checkpoint_space(alone(config)) is None


def test_weights_to_start_from_are_read(shards, tmp_path):
    state = initial_model(tiny_config(shards, tmp_path / "run")).state_dict()
    config = tiny_config(shards, tmp_path / "run", init_from=str(tmp_path / "c2i.pt"))
    torch.save({"model": state}, config.init_from)
    assert CHECK_WEIGHTS.run(alone(config)).detail.endswith("all finite")
    state["norm.weight"][3] = torch.nan
    torch.save({"model": state}, config.init_from)
    found = CHECK_WEIGHTS.run(alone(config))
    assert (found.state, found.permanent) == (FAILURE, True)
    assert f"{config.init_from}: norm.weight: 1 of 32 values are NaN" in found.detail


def test_nodes_without_room_to_stage_are_found(shards, tmp_path, monkeypatch):
    config = tiny_config(shards, tmp_path / "run", data={"cache_dir": str(tmp_path / "cache")})
    train, val = 160 * (3 * 16 * 2 + 8), 50 * (3 * 16 * 2 + 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, train + val))
    assert staging(alone(config)).state == OK
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, train + val - 1))
    found = staging(alone(config))
    assert found.state == FAILURE
    assert f"{tmp_path}/cache" in found.detail
    assert not (tmp_path / "cache").exists()
    left = tmp_path / "cache" / f"{Manifest.load(shards / 'train').fingerprint()}.download"
    left.mkdir(parents=True)
    (left / "train-000000.tar").write_bytes(b"x" * 1000)  # what an interrupted download has written already
    for missing, state in ((1000, OK), (1001, FAILURE)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=train + val - missing: Usage(0, 0, free))
        assert staging(alone(config)).state == state


def _row(*results: Result | None):
    return row_of(Check("disk", lambda context: None), results, [f"n{rank // 2}" for rank in range(len(results))])


def test_a_row_is_ok_or_shows_the_first_process_with_the_worst_result():
    assert _row(None, None) is None
    assert _row(None, Result("fine"), Result("good")).detail == "fine"
    bad = _row(Result("fine"), Result("slow", WARNING), Result("gone", FAILURE), Result("lost", FAILURE))
    assert (bad.state, bad.text, bad.detail, bad.node, bad.rank) == (FAILURE, "n1: gone", "gone", "n1", 2)
    permanent = _row(Result("gone", FAILURE), Result("wrong", FAILURE, permanent=True))
    assert (permanent.detail, permanent.rank, permanent.permanent) == ("wrong", 1, True)
    odd = _row(*(Result("", common=v) for v in ("2.1", "2.1", "2.6")))
    assert (odd.state, odd.rank, odd.detail) == (FAILURE, 2, "2.6, but 2.1 on n0; make it the same on all nodes")


def test_a_temporary_folder_is_removed_again_unless_it_is_used(tmp_path):
    with temporary_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with temporary_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "SLURMD_NODENAME": f"n{rank}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


@pytest.mark.processes
def test_the_command_line_checks_two_processes(tmp_path):
    file = file_of(tiny_config(shards_in(tmp_path), tmp_path / "run"), tmp_path)
    port, command = free_port(), [sys.executable, "-m", "npp_ds", "doctor", "--config", str(file), "--json"]
    started = []
    try:
        for rank in range(2):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=_environment(rank, 2, port), **pipes))
        (out, err), (other, other_err) = (process.communicate(timeout=120) for process in started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0, 0], err + other_err
    assert other == ""
    found = json.loads(out)
    assert (found["result"], found["processes"], found["nodes"]) == ("ok", 2, 2)
    assert "2 met at 127.0.0.1" in found["checks"][0]["detail"]


@pytest.mark.processes
def test_processes_that_do_not_meet_end_in_time_with_address_and_host():
    code = (
        "from datetime import timedelta; from npp_ds.distributed import process_group\n"
        "process_group.RENDEZVOUS_TIMEOUT = timedelta(seconds=2)\n"
    )
    port = free_port()
    last = _last_error_of_doctor(code, _environment(0, 2, port))
    assert last.startswith("error: host n0 (rank 0): processes: rank 0 on n0 did not meet all 2 processes at 127.0.0.1")
    assert f":{port} (MASTER_ADDR:MASTER_PORT) within 0:00:02" in last


@pytest.mark.processes
def test_connections_that_are_never_made_end_in_time():
    code = (
        "import time; from npp_ds.doctor import runner\n"
        "runner.CONNECT_TIMEOUT_SECONDS = 0.5; runner.join_processes = lambda timeout: time.sleep(50)\n"
    )
    last = _last_error_of_doctor(code, _environment(0, 2, 29500))
    reason = "not connected to all at 127.0.0.1:29500 within 0.5 s; see NCCL_DEBUG=INFO"
    assert last == f"error: host n0 (rank 0): processes: {reason}"


@pytest.mark.processes
def test_a_process_without_the_gpu_that_slurm_gave_says_so_before_it_joins():
    last = _last_error_of_doctor("", {**_environment(0, 2, 29500), "SLURM_GPUS_ON_NODE": "2"})
    assert last.startswith("error: host n0 (rank 0): processes: SLURM gave 2 GPUs and torch sees 0")


def _last_error_of_doctor(prepared: str, environment: dict[str, str]) -> str:
    """The last line on standard error of a process that checks the machine after `prepared` and ends with 1."""
    end = "import sys; from npp_ds.doctor import runner\nsys.exit(runner.run_doctor(runner.Request()))"
    command = [sys.executable, "-c", prepared + end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.processes
def test_a_step_of_no_run_is_refused():
    command = [sys.executable, "-m", "npp_ds", "doctor", "--step"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --step and key=value need a run: add --recipe NAME or --config FILE")


def test_a_taken_port_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "n0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    text = runner._why_not_joined(RendezvousError("code: -98, name: EADDRINUSE, message: address already in use"))
    assert text == "n0:29500: the port is taken by another program; set MASTER_PORT to a free one"


def test_a_connection_that_breaks_is_not_called_a_meeting_that_failed(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "n0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    text = runner._why_not_joined(torch.distributed.DistBackendError("NCCL error:\nsystem"))
    assert text == "met at n0:29500, but not connected: DistBackendError: NCCL error: system"
