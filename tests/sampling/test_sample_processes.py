"""Any number of processes, killed or not, write the samples of one uninterrupted process, byte for byte."""

import errno
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forks import Fork, fork_context, run_forked, run_main
from npp_ds.checkpoint.export import export_weights
from npp_ds.checkpoint.open import open_weights
from npp_ds.distributed.work_queue import WorkQueue
from npp_ds.sampling.folder import load_samples
from npp_ds.sampling.image_model import find_tokenizer
from npp_ds.sampling.job import Request, Sampling
from npp_ds.sampling.logits_processing import Options
from sample_sets import tiny_run
from workers import free_port

COUNT, PART_SIZE = 60, 5
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
FILES = ["grid.png", "images", "labels.csv", "samples.json", "samples.npz"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("tiny") / "run")


def arguments(run_dir: Path, out: Path) -> list[str]:
    options = {"count": COUNT, "part-size": PART_SIZE, "cfg-scale": 1.5, "batch-size": 4, "out": out}
    return ["sample", str(run_dir), "--png", *(text for k, v in options.items() for text in (f"--{k}", str(v)))]


def sampling(run_dir: Path, out: Path) -> Sampling:
    weights = open_weights(run_dir)
    request = Request([0, 1, 2], COUNT, options=Options(cfg_scale=1.5), part_size=PART_SIZE)
    return Sampling(weights, find_tokenizer(weights), request, out, batch_size=4, png=True)


@pytest.fixture(scope="module")
def expected(run_dir, tmp_path_factory):
    """Bytes of what one quiet process makes, by file."""
    out = tmp_path_factory.mktemp("expected")
    job = sampling(run_dir, out)
    assert job.run() == COUNT and job.finish()["repeated_images"] == 0
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    """All files below `out` but the record, which tells the time."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.name != "samples.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])  # accelerate: test_tokenize_processes.py
def test_two_processes_of_a_launcher_write_the_bytes_of_one(launcher, run_dir, expected, tmp_path):
    command = ["-m", "npp_ds", *arguments(run_dir, tmp_path / "out")]
    python, port = sys.executable, str(free_port())
    launchers = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"],
    }
    with open(tmp_path / "said", "w") as said:
        streams = {"stdout": said, "stderr": subprocess.STDOUT}
        if launcher in launchers:
            started = [subprocess.Popen([python, "-m", *launchers[launcher], *command], env=ENVIRONMENT, **streams)]
        else:  # what srun sets for its tasks
            places = [{"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r), "SLURM_STEP_NUM_TASKS": "2"} for r in range(2)]
            line = ["npp_ds.cli", *command[2:]]
            started = [
                Fork(run_main, *line, environment=ENVIRONMENT | place, output=tmp_path / "said") for place in places
            ]
        try:
            codes = [process.wait(timeout=120) for process in started]
        finally:
            for process in started:
                process.kill()
    text = (tmp_path / "said").read_text()
    assert codes == [0] * len(started), text
    assert contents(tmp_path / "out") == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert load_samples(tmp_path / "out")[2]["processes"] == 2
    assert f"{COUNT} images of step 120 in {tmp_path / 'out'}: " in text and "no two are equal" in text


def run_command(rank: int, world_size: int, line: list[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    sys.argv = ["npp", *line]
    from npp_ds.cli import main

    main()


def start(world_size: int, line: list[str]) -> list[multiprocessing.Process]:
    processes = [fork_context().Process(target=run_command, args=(r, world_size, line)) for r in range(world_size)]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[multiprocessing.Process], seconds: float, until=lambda: False) -> None:
    """Until all have ended, `until()` or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.is_alive() for process in processes) and not until():
        time.sleep(0.002)


@pytest.mark.processes
def test_kill_9_at_six_random_moments_ends_with_the_bytes_of_an_uninterrupted_run(run_dir, expected, tmp_path):
    out = tmp_path / "out"
    draw = random.Random(0)
    kills = finished = 0
    for attempt in range(60):
        processes = start(1 + attempt % 2, arguments(run_dir, out))
        try:
            parts = len(list(out.glob(".unfinished/*.npy")))
            moments = [
                lambda: True,  # while they start
                lambda parts=parts: len(list(out.glob(".unfinished/*.npy"))) > parts,  # while they draw
                lambda: (out / "samples.npz").exists() or any(out.glob(".samples.npz.*")),  # while they put together
            ]
            if kills < 6:
                wait(processes, 60, until=moments[attempt % 3])
                wait(processes, draw.uniform(0, 0.1))
            else:
                wait(processes, 90)
            kills += any(process.is_alive() for process in processes)
        finally:
            for process in processes:
                process.kill()
                process.join(timeout=30)
        if (out / "samples.json").exists() and not (out / ".unfinished").exists():
            assert contents(out) == expected
            finished += 1
            if kills >= 6:
                break
            shutil.rmtree(out)
    assert kills >= 6 and finished
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_no_process_waits_for_another_and_the_last_one_assembles_the_parts(run_dir, expected, tmp_path):
    early, late = (sampling(run_dir, tmp_path) for _ in range(2))
    with WorkQueue(tmp_path / ".unfinished", 0, 2) as queue:
        assert [part for _, part in zip(range(2), queue.take(9, lambda part: False), strict=False)] == [0, 1]
        assert early.run(0, 2) == COUNT - 2 * PART_SIZE
        assert early.finish() is None and not (tmp_path / "samples.npz").exists()
    assert late.run(1, 2) == 2 * PART_SIZE
    assert late.finish()["processes"] == 2
    assert contents(tmp_path) == expected
    assert early.finish()["count"] == COUNT


def test_a_process_that_starts_after_the_end_samples_nothing(run_dir, expected, tmp_path, monkeypatch):
    late = sampling(run_dir, tmp_path)
    done = sampling(run_dir, tmp_path)
    take = WorkQueue._take

    def others_finish_first(queue: WorkQueue, part: int) -> bool:
        monkeypatch.setattr(WorkQueue, "_take", take)
        done.run()
        done.finish()
        return take(queue, part)

    monkeypatch.setattr(WorkQueue, "_take", others_finish_first)
    assert late.run() == 0 and late.finish()["count"] == COUNT
    assert contents(tmp_path) == expected


def test_without_file_locks_the_parts_are_assigned_in_turn(run_dir, expected, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", no_locks)
    pair = [sampling(run_dir, tmp_path) for _ in range(2)]
    assert [job.run(rank, 2) for rank, job in enumerate(pair)] == [COUNT // 2, COUNT // 2]
    assert all(job.finish()["count"] == COUNT for job in pair)
    assert contents(tmp_path) == expected


@pytest.mark.processes
def test_the_command_samples_explains_errors_and_reports_when_nothing_is_left_to_do(run_dir, tmp_path):
    def npp(*line: str) -> subprocess.CompletedProcess:
        return run_forked("npp_ds.cli", "sample", *line, environment=ENVIRONMENT | {"COLUMNS": "120"}, folder=tmp_path)

    first = npp(str(run_dir), "--classes", "2,0", "--per-class", "4", "--patch-side", "2", "--image-size", "24")
    assert first.returncode == 0, first.stderr
    out = run_dir / "samples/step-00000120-cfg-1-seed-0-8-images-patch-side-2-classes-2-0-24-pixels"
    assert f"8 images of step 120 in {out}: this process sampled 8 at" in first.stdout
    assert "from a stage of patch side 1 and are sampled at 2; sample them with --patch-side 1" in first.stderr
    images, labels, record = load_samples(out)
    assert images.shape == (8, 24, 24, 3) and labels.tolist() == [2, 0] * 4 and record["dtype"] == "fp32"

    again = npp(str(run_dir), "--classes", "2,0", "--per-class", "4", "--patch-side", "2", "--image-size", "24")
    assert again.returncode == 0 and "nothing was left to do" in again.stdout
    other = npp(str(run_dir), "--classes", "2,0", "--per-class", "4", "--out", str(out))
    assert other.returncode == 2 and "patch_side: found 2, requested 1" in other.stderr
    uneven = npp(str(run_dir), "--count", "50")
    assert uneven.returncode == 2 and "cannot be divided evenly among 3 classes; use 51 or 48" in uneven.stderr

    export_weights(open_weights(run_dir), tmp_path / "tiny.safetensors")
    unknown = npp("tiny.safetensors", "--per-class", "2")
    assert unknown.returncode == 2 and "give its name or file with --tokenizer" in unknown.stderr
    options = ("--cfg-scale", "2", "--cfg-schedule", "cosine", "--cfg-power", "2", "--cfg-interval", "9", "--png")
    file = npp("tiny.safetensors", "--tokenizer", str(run_dir / "vq.safetensors"), "--per-class", "2", *options)
    assert file.returncode == 0, file.stderr
    (out,) = tmp_path.glob("samples/tiny/*")
    assert out.name == "step-00000120-cfg-2-seed-0-6-images-cfg-schedule-cosine-cfg-power-2-cfg-interval-9"
    record = load_samples(out)[2]
    assert (record["cfg_schedule"], record["cfg_power"], record["cfg_interval"]) == ("cosine", 2, 9)
    assert len(list(out.glob("images/*.png"))) == 6
    for done in (other, uneven, unknown):
        assert done.stderr.count("\n") <= 2 and "Traceback" not in done.stderr
