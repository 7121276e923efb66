"""The shipped scripts on a real SLURM of three nodes, namespaces of this machine, with tiny models on the CPU."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from image_sets import SHIPPED, few_images
from launches import last_step
from npp_ds.config.schema import RunConfig
from runs import WATCHED, Outcome, assert_same, outcome_of, tiny_config
from slurm_cluster import ROOT, Job, SlurmCluster, wait_for, why_not

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]

TINY_JOB = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1G")


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with SlurmCluster() as cluster:
        yield cluster


def long_run(shards: Path, run_dir: Path) -> RunConfig:
    """Three stages of 100, 100 and 200 steps."""
    validation = {**WATCHED["validation"], "every": 100}
    keys = {**WATCHED, "schedule": {"epochs": 40}, "validation": validation, "checkpoint": {"every": 40}}
    return tiny_config(shards, run_dir, **keys)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Outcome:
    """What `long_run` leaves behind under torchrun."""
    config = long_run(shards, tmp_path_factory.mktemp("undisturbed") / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "npp_ds"]
    done = subprocess.run(
        [*command, "train", "--recipe", "xxl_256", *overrides(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return outcome_of(config.directory)


def overrides(config: RunConfig, *left_out: str) -> list[str]:
    """key=value for every key of `config` but those left out."""

    def flat(value: Any, key: str) -> Iterator[str]:
        if isinstance(value, dict) and value:
            for name, part in value.items():
                yield from flat(part, f"{key}.{name}" if key else name)
        elif key not in left_out:
            yield f"{key}={json.dumps(value)}"

    return list(flat(config.model_dump(mode="json"), ""))


class Training(NamedTuple):
    """A job of the shipped script; `run_dir` follows from its variables."""

    job: Job
    run_dir: Path


def train(slurm: SlurmCluster, config: RunConfig, shards: Path, *sbatch: str, **variables: str) -> Training:
    """`sbatch slurm/train_xxl.sh` with tiny overrides; data and run folder are those of the variables."""
    runs = config.directory.parent
    keys = overrides(config, "run_dir", "data.train", "data.val", "data.cache_dir", "name")
    places = {"DATA_DIR": shards, "RUNS_DIR": runs, "NPP_CACHE_DIR": shards / "cache", "NPP_PYTHON": sys.executable}
    places = {**{name: str(place) for name, place in places.items()}, **variables}
    job = slurm.submit(*TINY_JOB, f"--output={runs}/%x-%j.log", *sbatch, "slurm/train_xxl.sh", *keys, **places)
    return Training(job, runs / "xxl_256")


def test_two_nodes_train_what_torchrun_trains(slurm, shards, tmp_path, undisturbed):
    config = long_run(shards, tmp_path / "run")
    before = {node.name: node.sent_bytes() for node in slurm.nodes.values()}
    job, run_dir = train(slurm, config, shards)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert "2 processes" in job.log() and "2 nodes" in job.log()
    sent = {node.name: node.sent_bytes() - before[node.name] for node in slurm.nodes.values()}
    # In each of 400 steps a node sends the other's half of the gradients and its own half of the weights, in fp32.
    assert min(sent["n1"], sent["n2"]) > 400 * 4 * config.model.parameters() > 10 * sent["n3"], sent
    assert_same(outcome_of(run_dir), undisturbed)
    assert job.shown()["Restarts"] == "0"


@pytest.mark.parametrize("request_", ["scontrol requeue", "scancel --signal=USR1", "scancel --batch --signal=USR1"])
def test_a_job_that_is_asked_to_stop_saves_and_comes_back(slurm, shards, tmp_path, undisturbed, request_):
    job, run_dir = train(slurm, long_run(shards, tmp_path / "run"), shards)
    wait_until_step(job, run_dir, 50)
    slurm.ask(*request_.split(), str(job.number))
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.shown()["Restarts"] == "1"
    assert "rerun the same command to resume" in job.log() and "resuming after step" in job.log()
    assert_same(outcome_of(run_dir), undisturbed)


def test_a_killed_task_ends_the_job_at_once_and_the_job_comes_back(slurm, shards, tmp_path, undisturbed):
    job, run_dir = train(slurm, long_run(shards, tmp_path / "run"), shards)
    wait_until_step(job, run_dir, 50)
    tasks = job.tasks()
    assert sorted(tasks) == ["n1", "n2"]
    os.kill(tasks["n2"], signal.SIGKILL)
    job.wait_for_restart(60)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert_same(outcome_of(run_dir), undisturbed)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_dead_node_ends_the_job_soon_and_the_job_comes_back_on_others(slurm, shards, tmp_path, undisturbed, node):
    job, run_dir = train(slurm, long_run(shards, tmp_path / "run"), shards)
    wait_until_step(job, run_dir, 50)
    slurm.kill_node(node)
    try:
        job.wait_for_restart(120)
        assert job.wait_for_end() == "COMPLETED", job.log()
    finally:
        slurm.start_node(node)
        slurm.wait_for_nodes()
    lists = re.findall(r" nodes \((\S+)\), 2 tasks", job.log())
    nodes = [slurm.ask("scontrol", "show", "hostnames", text).split() for text in lists]
    assert nodes == [["n1", "n2"], sorted({"n1", "n2", "n3"} - {node})]
    assert_same(outcome_of(run_dir), undisturbed)


def test_a_job_saves_before_its_time_is_up_and_comes_back(slurm, shards, tmp_path, undisturbed):
    job, run_dir = train(slurm, long_run(shards, tmp_path / "run"), shards, "--time=60")
    wait_until_step(job, run_dir, 50)
    tasks = job.tasks().values()
    for pid in tasks:  # until SLURM looks at the clock the run would be over
        os.kill(pid, signal.SIGSTOP)
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=5")
    wait_for(lambda: "got SIGUSR1" in job.log(), 120, job.log)
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    for pid in tasks:
        os.kill(pid, signal.SIGCONT)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert job.shown()["Restarts"] == "1" and "SIGUSR1: saved after step" in job.log()
    assert_same(outcome_of(run_dir), undisturbed)


def test_a_cancelled_job_stays_away(slurm, shards, tmp_path):
    job, run_dir = train(slurm, long_run(shards, tmp_path / "run"), shards)
    wait_until_step(job, run_dir, 20)
    slurm.ask("scancel", str(job.number))
    wait_for(lambda: "SLURM itself cancels or requeues the job" in job.log(), 60, job.log)
    assert job.wait_for_end() == "CANCELLED" and job.shown()["Restarts"] == "0"
    assert "saved after step" in job.log()


@pytest.mark.parametrize("code, starts", [(2, 1), (3, 1), (1, 3), (4, 3), (137, 3)])
def test_a_job_that_fails_or_makes_no_progress_is_not_requeued_for_ever(slurm, shards, tmp_path, code, starts):
    program = python_of(tmp_path, f"[[ $SLURM_PROCID != 1 ]] || exit {code}; exec sleep 60")
    job, _ = train(slurm, long_run(shards, tmp_path / "run"), shards, NPP_PYTHON=program)
    assert job.wait_for_end(90) == "FAILED"
    assert job.shown()["ExitCode"] == f"{code}:0"
    assert re.findall(r"start (\d), on", job.log()) == list("123")[:starts]
    assert job.shown()["Restarts"] == str(starts - 1)
    assert job.log().rstrip().endswith("not requeued")
    assert not list((tmp_path / ".slurm").iterdir())


def test_a_job_that_is_preempted_again_and_again_comes_back_each_time(slurm, shards, tmp_path):
    # By turns the tasks alone are asked to stop, and the whole job by a signal that its tasks do not survive.
    stop = "((SLURM_RESTART_COUNT % 2)) || exit 75; scancel --batch --signal=USR1 $SLURM_JOB_ID; exec sleep 60"
    program = python_of(tmp_path, f"((SLURM_RESTART_COUNT < 4)) || exit 0; {stop}")
    job, _ = train(slurm, long_run(shards, tmp_path / "run"), shards, NPP_PYTHON=program)
    assert job.wait_for_end(180) == "COMPLETED", job.log()
    assert job.shown()["Restarts"] == "4"


def test_a_job_waits_for_a_controller_that_is_away_when_it_wants_another_start(slurm, shards, tmp_path):
    program = python_of(
        tmp_path,
        f"((SLURM_RESTART_COUNT == 0)) || exit 0; touch {tmp_path}/runs_$SLURM_PROCID; "
        f"until [[ -e {tmp_path}/stop ]]; do sleep 0.2; done; exit 75",
    )
    job, _ = train(slurm, long_run(shards, tmp_path / "run"), shards, NPP_PYTHON=program)
    wait_for(lambda: len(list(tmp_path.glob("runs_*"))) == 2, 60, job.log)
    log = Path(job.shown()["StdOut"])
    slurm.stop_controller()
    try:
        (tmp_path / "stop").touch()
        wait_for(lambda: list((tmp_path / ".slurm").glob("*/codes/*.75")) != [], 30, log.read_text)
        time.sleep(15)  # longer than scontrol itself waits
        assert "requeued" not in log.read_text()
    finally:
        slurm.start_controller()
    assert job.wait_for_end(180) == "COMPLETED", job.log()
    assert job.shown()["Restarts"] == "1" and "ended with 75: requeued" in job.log()


def test_tasks_have_the_variables_that_the_script_sets_whatever_sbatch_exports(slurm, shards, tmp_path):
    program = python_of(tmp_path, f"[[ $PYTHONPATH == {ROOT}* && -n $OMP_NUM_THREADS ]] || exit 2")
    places = {"NPP_PYTHON": program, "DATA_DIR": shards, "RUNS_DIR": tmp_path}
    exported = ",".join(f"{name}={value}" for name, value in places.items())
    job = slurm.submit(*TINY_JOB, f"--export={exported}", f"--output={tmp_path}/log", "slurm/train_b.sh")
    assert job.wait_for_end() == "COMPLETED", job.log()


def test_a_task_of_an_array_comes_back_without_the_others(slurm, shards, tmp_path):
    asked = f"((SLURM_ARRAY_TASK_ID == 0 || SLURM_RESTART_COUNT)) || {{ touch {tmp_path}/asked; exit 75; }}"
    program = python_of(
        tmp_path,
        f"{asked}; ((SLURM_ARRAY_TASK_ID)) || until [[ -e {tmp_path}/asked ]]; do sleep 0.2; done; sleep 5; exit 0",
    )
    places = {"NPP_PYTHON": program, "RUNS_DIR": tmp_path, "DATA_DIR": tmp_path, "IMAGES": "-", "TOKENIZER": "-"}
    options = (*TINY_JOB, "--nodes=1", "--array=0-1", f"--output={tmp_path}/%x-%a.log")
    array = slurm.submit(*options, "slurm/tokenize.sh", **{name: str(place) for name, place in places.items()})
    tasks = [Job(slurm, f"{array.number}_{i}") for i in range(2)]
    assert [task.wait_for_end(120) for task in tasks] == ["COMPLETED"] * 2, [task.log() for task in tasks]
    assert [len(re.findall(r"start \d, on", task.log())) for task in tasks] == [1, 2], [task.log() for task in tasks]


@pytest.mark.parametrize(
    "problem, said",
    [
        ("no data", r"error: host n1 \(rank 0\): .*nowhere/train/manifest.json"),
        ("three tasks", r"error: host n1 \(rank 0\): .*schedule\.batch_size"),
        ("a node without the shards", r"error: host n2 \(rank 1\): .*/n2/train"),
        ("no variable", "error .*DATA_DIR is not set"),
    ],
)
def test_wrong_settings_end_in_seconds_with_one_line_that_says_it(slurm, shards, tmp_path, problem, said):
    config, options, variables = long_run(shards, tmp_path / "run"), [], {}
    if problem == "no data":
        variables = {"DATA_DIR": str(tmp_path / "nowhere")}
    elif problem == "three tasks":
        options = ["--nodes=3"]
    elif problem == "no variable":
        variables = {"DATA_DIR": ""}
    else:  # what a local disk would be
        (tmp_path / "n1").symlink_to(shards)
        variables = {"DATA_DIR": f"{tmp_path}/$SLURMD_NODENAME"}
    job, _ = train(slurm, config, shards, *options, **variables)
    assert job.wait_for_end(60) == "FAILED"
    assert job.shown()["ExitCode"] == "2:0" and job.shown()["Restarts"] == "0"
    assert len(re.findall("^error", job.log(), re.M)) == 1 and re.search(said, job.log()), job.log()
    assert "Traceback" not in job.log()


def test_images_become_shards_a_run_and_a_score_on_two_nodes(slurm, tmp_path):
    for split, count in (("train", 96), ("val", 32)):
        few_images(tmp_path / "images", split, count)
    shutil.copy(SHIPPED / "classes.txt", tmp_path / "images")
    codes, runs = tmp_path / "codes", tmp_path / "runs"
    places = {
        "DATA_DIR": codes, "RUNS_DIR": runs, "NPP_CACHE_DIR": tmp_path / "cache", "NPP_PYTHON": sys.executable,
        "IMAGES": tmp_path / "images", "TOKENIZER": "fashion_mnist", "REFERENCE": tmp_path / "images/val-*.tar.gz",
    }  # fmt: skip

    def ends_well(*line: str) -> str:
        variables = {name: str(place) for name, place in places.items()}
        job = slurm.submit(*TINY_JOB, f"--output={tmp_path}/%x.log", *line, **variables)
        assert job.wait_for_end() == "COMPLETED", job.log()
        assert "2 tasks" in job.log()
        return job.log()

    settings = ("--image-size", "32", "--samples-per-shard", "16", "--workers", "0")
    ends_well("slurm/tokenize.sh", *settings)
    for split, crops in (("train", "ten"), ("val", "center")):
        command = [sys.executable, ROOT / "data_prep/tokenize_imagenet.py", "--images", tmp_path / "images"]
        command += ["--split", split, "--out", tmp_path / "alone" / split, "--tokenizer", "fashion_mnist"]
        subprocess.run([*command, "--crops", crops, *settings], check=True, timeout=120)
    assert contents(codes) == contents(tmp_path / "alone") and len(list(codes.rglob("*.tar"))) == 6 + 2

    ends_well(
        "slurm/train_b.sh", "model.size=null", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "precision=fp32",
        "model.vocab_size=512", "model.grid_size=8", "model.num_classes=10", "schedule.batch_size=16",
        "schedule.epochs=2", "schedule.warmup_epochs=0", "data.tokenizer=fashion_mnist",
    )  # fmt: skip
    scoring = ("slurm/evaluate.sh", "b_256", "--per-class", "2", "--part-size", "4")
    wrong = {name: str(place) for name, place in places.items()} | {"REFERENCE": str(tmp_path / "none.npz")}
    job = slurm.submit(*TINY_JOB, f"--output={tmp_path}/wrong.log", *scoring, **wrong)
    assert job.wait_for_end() == "FAILED" and job.shown()["ExitCode"] == "2:0"
    assert f"{tmp_path}/none.npz: no readable .npz file" in job.log()
    assert not (runs / "b_256/samples").exists()
    log = ends_well(*scoring)
    (samples,) = (runs / "b_256/samples").iterdir()
    assert samples.name == "step-00000012_--per-class_2_--part-size_4"
    assert json.loads((samples / "samples.json").read_text())["count"] == 20
    assert np.load(samples / "samples.npz")["arr_0"].shape == (20, 32, 32, 3)
    assert "20 samples" in log
    assert "nothing was left to do" in ends_well(*scoring) and len(list((runs / "b_256/samples").iterdir())) == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_until_step(job: Job, run_dir: Path, step: int) -> None:
    wait_for(lambda: last_step(run_dir) >= step, 120, job.log)


def python_of(folder: Path, text: str) -> str:
    """A program of these lines to run instead of Python; as the doctor it finds nothing."""
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n[[ $* != *doctor* ]] || exit 0\n{text}\n")
    path.chmod(0o755)
    return str(path)
