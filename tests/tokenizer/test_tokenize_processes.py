"""Whatever happens to the processes (killed, many at once, a full disk), the set has the bytes of one quiet run."""

import contextlib
import errno
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_tokenize import digests

from forks import fork_context
from image_sets import WRITERS, image_files, save_tiny_tokenizer, write_tree
from npp_ds.data.manifest import Manifest
from npp_ds.data.shards import verify
from npp_ds.distributed.work_queue import WorkQueue
from npp_ds.errors import UserError
from npp_ds.tokenizer import load_tokenizer
from npp_ds.tokenizer.decoding import DecodePool, Task, tasks_of
from npp_ds.tokenizer.encode import EncodeSettings, Encoding
from npp_ds.tokenizer.sources import open_source
from shard_sets import files_limited_to
from workers import free_port

SCRIPT = Path(__file__).parents[2] / "data_prep" / "tokenize_imagenet.py"
TOKEN = "NPP_TEST_TOKENIZE"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """(source by variant, tokenizer file)."""
    folder = tmp_path_factory.mktemp("material")
    files = image_files()
    sources = {variant: write(folder / variant, files) for variant, write in WRITERS.items()}
    return sources, save_tiny_tokenizer(folder / "tiny.safetensors")


def arguments(source: Path, out: Path, tokenizer: Path, workers: int = 1) -> list[str]:
    options = {"images": source, "out": out, "tokenizer": tokenizer, "image-size": 32, "crops": "ten"}
    options |= {"samples-per-shard": 8, "batch-size": 40, "max-skipped": 0.1, "device": "cpu", "workers": workers}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def settings(**changes) -> EncodeSettings:
    made = {"image_size": 32, "crops": "ten", "crop_ranges": (1.1,), "samples_per_shard": 8, "crop_batch_size": 40}
    return EncodeSettings(split="train", **{**made, "max_skipped": 0.1, **changes})


def encoding(source: Path, tokenizer: Path, out: Path, **changes) -> Encoding:
    return Encoding(open_source([source], "train"), load_tokenizer(tokenizer), out, settings(**changes))


@pytest.fixture(scope="module")
def expected(material, tmp_path_factory):
    """Bytes of the set that one quiet process makes of the tar of tars, without decoding processes."""
    sources, tokenizer = material
    out = tmp_path_factory.mktemp("expected")
    job = encoding(sources["imagenet-tar"], tokenizer, out)
    job.run()
    job.finish()
    assert verify(out) == []
    return digests(out)


def shards_in(contents: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in contents.items() if name.endswith(".tar")}


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("variant", WRITERS)
def test_every_source_gives_the_same_shards(variant, workers, material, expected, tmp_path):
    sources, tokenizer = material
    job = encoding(sources[variant], tokenizer, tmp_path, workers=workers)
    assert job.run() == 65
    manifest = job.finish()
    assert shards_in(digests(tmp_path)) == shards_in(expected)
    assert (manifest.num_samples, len(manifest.skipped), manifest.source["images"]) == (62, 3, 65)
    assert manifest.source["kind"] == variant and verify(tmp_path) == []


@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["accelerate", "srun"])
def test_two_processes_of_a_launcher_write_the_bytes_of_one(launcher, material, expected, tmp_path):
    sources, tokenizer = material
    command = [str(SCRIPT), *arguments(sources["imagenet-tar"], tmp_path, tokenizer)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if launcher == "accelerate":
        program = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        port = ["--main_process_port", str(free_port())]
        started = [subprocess.Popen([*program, *port, *command], env=environment)]
    else:  # what srun sets for its tasks
        tasks = (
            {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2"} for rank in range(2)
        )
        started = [subprocess.Popen([sys.executable, *command], env=environment | task) for task in tasks]
    assert [process.wait(timeout=120) for process in started] == [0] * len(started)
    assert digests(tmp_path) == expected
    assert not (tmp_path / ".unfinished").exists()


def run_script(rank: int, world_size: int, token: str, line: list[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ[TOKEN] = token
    sys.argv = [str(SCRIPT), *line]
    sys.exit(runpy.run_path(str(SCRIPT))["main"]())


def start(world_size: int, token: str, line: list[str]) -> list[multiprocessing.Process]:
    processes = [
        fork_context().Process(target=run_script, args=(r, world_size, token, line)) for r in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def processes_of(token: str) -> list[int]:
    """Processes whose environment holds the token: the decoding processes of a process that ran with it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TOKEN}={token}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def wait(processes: list[multiprocessing.Process], seconds: float, until=lambda: False) -> None:
    """Until all have ended, `until()` or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.is_alive() for process in processes) and not until():
        time.sleep(0.002)


def is_writing(out: Path, process: multiprocessing.Process) -> bool:
    return any(out.glob(f".train-*.tar.{process.pid}.tmp"))


@pytest.mark.processes
def test_kill_9_at_ten_random_moments_ends_with_the_bytes_of_one_quiet_run(material, expected, tmp_path):
    sources, tokenizer = material
    out, token = tmp_path / "out", str(tmp_path)
    line = arguments(sources["imagenet-tar"], out, tokenizer)
    draw = random.Random(0)
    kills = 0
    for attempt in range(60):
        processes = start(1 + attempt % 2, token, line)
        if kills < 2:  # while they start
            wait(processes, draw.uniform(0, 2))
        elif kills < 10:  # while they write
            wait(processes, 60, until=lambda started=processes: any(is_writing(out, process) for process in started))
            wait(processes, draw.uniform(0, 0.15))
        else:
            wait(processes, 60)
        if any(process.is_alive() for process in processes):
            kills += 1
        for process in processes:
            process.kill()
            process.join(timeout=30)
        made = digests(out) if out.is_dir() else {}
        assert all(expected[name] == digest for name, digest in shards_in(made).items())
        if "manifest.json" in made:
            if kills >= 10:
                break
            shutil.rmtree(out)
    assert kills >= 10 and digests(out) == expected
    assert not (out / ".unfinished").exists()
    deadline = time.monotonic() + 20
    while processes_of(token) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(token) == []


@pytest.mark.parametrize("size", [1_000, 20_000, 30_000])
def test_a_full_disk_stops_with_one_line_leaves_no_half_shard_and_is_no_obstacle(
    size, material, expected, tmp_path, monkeypatch, capsys
):
    sources, tokenizer = material
    out = tmp_path / "out"
    line = arguments(sources["imagenet-tar"], out, tokenizer, workers=0)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *line])
    with files_limited_to(size):
        assert runpy.run_path(str(SCRIPT))["main"]() == 2
    error = capsys.readouterr().err
    assert "File too large; finished shards are kept" in error and len(error.splitlines()) == 1
    assert all(expected[name] == digest for name, digest in shards_in(digests(out)).items())
    assert not list(out.rglob("*.tmp")) and not (out / "manifest.json").exists()
    assert runpy.run_path(str(SCRIPT))["main"]() == 0
    assert digests(out) == expected


def test_no_process_waits_and_the_last_one_writes_the_manifest(material, expected, tmp_path):
    sources, tokenizer = material
    early, late = (encoding(sources["imagenet-tar"], tokenizer, tmp_path) for _ in range(2))
    with WorkQueue(tmp_path / ".unfinished", 0, 2) as queue:
        taken = [shard for _, shard in zip(range(2), queue.take(9, lambda shard: False), strict=False)]
        assert taken == [0, 1]
        assert early.run(0, 2) == 65 - 2 * 8
        assert early.finish() is None and not (tmp_path / "manifest.json").exists()
    assert late.run(1, 2) == 2 * 8
    assert late.finish().num_samples == 62
    assert digests(tmp_path) == expected
    assert early.finish().num_samples == 62


def test_without_file_locks_the_processes_take_shards_in_turn(material, expected, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", no_locks)
    sources, tokenizer = material
    pair = [encoding(sources["imagenet-tar"], tokenizer, tmp_path) for _ in range(2)]
    assert [job.run(rank, 2) for rank, job in enumerate(pair)] == [33, 32]
    assert all(job.finish().num_samples == 62 for job in pair)
    assert digests(tmp_path) == expected


def test_what_killed_writers_left_is_removed(material, expected, tmp_path):
    sources, tokenizer = material
    for name in (".train-000002.tar.123.tmp", ".manifest.json.123.tmp"):
        (tmp_path / name).write_bytes(b"half")
    job = encoding(sources["imagenet-tar"], tokenizer, tmp_path)
    job.run()
    job.finish()
    assert digests(tmp_path) == expected


@pytest.mark.processes
def test_a_killed_decoding_process_is_one_clear_error(material):
    items = open_source([material[0]["imagefolder"]], "train").items
    with DecodePool(32, (), workers=2, ahead=32) as pool, pytest.raises(UserError, match="exit code -9"):
        for _ in pool.map(tasks_of(0, items * 20)):
            os.kill(pool.workers[1].process.pid, signal.SIGKILL)


@pytest.mark.processes
def test_a_crash_of_a_decoder_names_its_image(material, tmp_path, monkeypatch):
    """A process that starts with this PYTHONPATH ends at once when it opens an image of 12345 bytes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from PIL import Image\n"
        "load = Image.open\n"
        "Image.open = lambda file, **more: os._exit(99) if len(file.getvalue()) == 12345 else load(file, **more)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    images = write_tree(
        tmp_path, {f"a/{name}.png": bytes(12345 if name == "evil" else 9) for name in ("b", "c", "evil", "z")}
    )
    with (
        DecodePool(32, (), workers=1, ahead=32) as pool,
        pytest.raises(UserError, match=r"exit code 99 .* while it decoded .*a/evil\.png;"),
    ):
        list(pool.map(tasks_of(0, open_source([images], "train").items)))


@pytest.mark.processes
def test_decoding_processes_keep_the_order_and_raise_what_they_meet(material, tmp_path):
    items = open_source([material[0]["imagefolder"]], "train").items
    with DecodePool(32, (1.1,), workers=3, ahead=0) as pool:
        results = [replace(r, squares=[s.copy() for s in r.squares]) for r in pool.map(tasks_of(7, items))]
    seen = [item for result in results for item in result.readable + [item for item, _ in result.unreadable]]
    assert sorted(seen, key=items.index) == items and {result.shard for result in results} == {7}
    with DecodePool(32, (1.1,), workers=0, ahead=0) as alone:
        for result, same in zip(results, alone.map(tasks_of(7, items)), strict=True):
            assert result.readable == same.readable and result.unreadable == same.unreadable
            np.testing.assert_array_equal(result.squares[0], same.squares[0])
            assert result.squares[0].shape == (len(result.readable), 35, 35, 3)
    tree = write_tree(tmp_path, {"a/x.png": b"12345"})
    gone = open_source([tree], "train").items
    (tree / "train/a/x.png").unlink()
    with DecodePool(32, (), workers=1, ahead=0) as pool, pytest.raises(UserError, match=r"x\.png: could not be read"):
        list(pool.map([Task(0, gone)]))


def test_a_complete_set_is_left_as_it_is(material, tmp_path):
    sources, tokenizer = material
    encoding(sources["imagefolder"], tokenizer, tmp_path).run()
    encoding(sources["imagefolder"], tokenizer, tmp_path).finish()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = encoding(sources["imagefolder"], tokenizer, tmp_path)
    assert again.run() == 0 and again.finish() == Manifest.load(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
