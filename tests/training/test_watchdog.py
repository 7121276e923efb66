"""A process that stands still ends, and the stacks of all ranks are in one file; one that works is left alone."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from npp_ds.training.watchdog import STALLED, Watchdog
from workers import free_port

pytestmark = pytest.mark.processes

# Beats for some steps of a tenth of the allowed time, then does what stands in the place of CULPRIT.
PROGRAM = """
import ctypes, sys, threading, time
from npp_ds.training.watchdog import Watchdog
rank, seconds, steps = int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
SETUP
def culprit():
    CULPRIT
with Watchdog(sys.argv[1], rank, seconds) as watchdog:
    for _ in range(steps):
        time.sleep(seconds / 10)
        watchdog.progress.set()
    culprit()
print("went on", flush=True)
"""
LOCK = "lock = threading.Lock(); lock.acquire(); lock.acquire()"
INTERPRETER = "ctypes.PyDLL(None).sleep(60)"
GLOO = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:PORT", rank=rank, world_size=2)
dist.all_reduce(torch.ones(1))
"""


class Program:
    """A process with a watchdog; `end()` gives its exit code, standard output and standard error."""

    def __init__(self, path: Path, culprit: str, *, rank: int = 0, seconds: float = 2.0, steps: int = 3, setup=""):
        text = PROGRAM.replace("SETUP", setup).replace("CULPRIT", culprit)
        arguments = [str(path), str(rank), str(seconds), str(steps)]
        self.process = subprocess.Popen([sys.executable, "-c", text, *arguments], stdout=-1, stderr=-1, text=True)

    def end(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=30)
        return self.process.returncode, output, errors


@pytest.fixture
def program() -> Iterator[Any]:
    started = []

    def begin(*args: Any, **keys: Any) -> Program:
        started.append(Program(*args, **keys))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_a_process_that_beats_is_left_alone_for_many_intervals_and_leaves_no_file(program, tmp_path):
    path = tmp_path / "stalled.txt"
    began = time.monotonic()
    assert program(path, "pass", seconds=1.5, steps=60).end() == (0, "went on\n", "")
    assert time.monotonic() - began > 6 * 1.5
    assert not path.exists()


def test_the_file_exists_only_after_a_stall(program, tmp_path):
    path = tmp_path / "stalled.txt"
    with Watchdog(path, 0, 60):
        time.sleep(0.2)
        assert not path.exists()
    killed = program(path, "print('ready', flush=True); time.sleep(60)", seconds=50.0, steps=0)
    assert killed.process.stdout.readline() == "ready\n"
    killed.process.kill()
    killed.end()
    time.sleep(0.2)
    assert not path.exists()


def test_a_process_that_waits_for_a_lock_ends_with_code_4_and_names_the_culprit(program, tmp_path):
    path = tmp_path / "stalled.txt"
    began = time.monotonic()
    stalled = program(path, LOCK, rank=3)
    code, output, errors = stalled.end()
    assert (code, output) == (STALLED, "") and STALLED == 4
    assert 0.6 + 2.0 + 1.0 < time.monotonic() - began < 15  # steps, the limit, time for other ranks to write
    text = path.read_text()
    header = text.splitlines()[0]
    assert header.startswith("=== 20") and f"rank 3, host {socket.gethostname()}" in header
    assert f"pid {stalled.process.pid}: no step for 2 s" in header
    assert "in culprit" in text and text.count("hread 0x") == 3  # the main one, the watchdog, its last resort
    assert errors.count("\n") == 1 and str(path) in errors and "rank 3" in errors


def test_a_process_that_holds_the_interpreter_ends_and_its_stack_is_in_the_file(program, tmp_path):
    path = tmp_path / "stalled.txt"
    began = time.monotonic()
    code, output, _ = program(path, INTERPRETER).end()
    assert (code, output) == (1, "")
    assert time.monotonic() - began < 15
    assert path.read_text().startswith("Timeout (0:00:02") and "in culprit" in path.read_text()


@pytest.mark.parametrize("culprit", ["time.sleep(60)", INTERPRETER])
def test_the_stacks_of_the_culprit_and_of_those_who_wait_for_it_are_in_one_file(program, tmp_path, culprit):
    path = tmp_path / "stalled.txt"
    setup = GLOO.replace("PORT", str(free_port()))
    waiting = program(path, "dist.all_reduce(torch.ones(1))", rank=0, setup=setup)
    standing = program(path, f"# standing still\n    {culprit}", rank=1, setup=setup)
    codes = [standing.end()[0], waiting.end()[0]]
    assert codes == [1 if culprit == INTERPRETER else STALLED, STALLED]
    text = path.read_text()
    assert f"rank 0, host {socket.gethostname()}, pid {waiting.process.pid}:" in text
    assert "in all_reduce" in text and text.count("in culprit") == 2
    assert ("Timeout" in text) == (culprit == INTERPRETER)


def test_many_ranks_write_whole_blocks(program, tmp_path):
    path = tmp_path / "stalled.txt"
    ranks = [program(path, LOCK, rank=rank) for rank in range(6)]
    assert [one.end()[0] for one in ranks] == [STALLED] * 6
    blocks = path.read_text().split("=== ")[1:]
    assert len(blocks) == 6
    assert sorted(block.split("rank ")[1][0] for block in blocks) == list("012345")
    assert all(block.count("in culprit") == 1 and block.endswith("in <module>\n\n") for block in blocks)


def test_a_file_that_cannot_be_written_leaves_the_stacks_on_standard_error(program, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    stalled = program(folder / "stalled.txt", "import shutil; shutil.rmtree(sys.argv[1].rpartition('/')[0]); " + LOCK)
    code, _, errors = stalled.end()
    assert code == STALLED and "in culprit" in errors and not folder.exists()


def test_a_file_system_that_stands_still_does_not_keep_the_process(program, tmp_path):
    freeze = "import npp_ds.training.watchdog as w; w.locked = lambda path, patience: time.sleep(60)"
    began = time.monotonic()
    assert program(tmp_path / "stalled.txt", LOCK, setup=freeze).end()[0] == STALLED
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("seconds", [0, -1])
def test_no_seconds_is_off(tmp_path, seconds):
    before = threading.active_count()
    with Watchdog(tmp_path / "stalled.txt", 0, seconds) as watchdog:
        watchdog.progress.set()
        assert threading.active_count() == before and not any(tmp_path.iterdir())
    watchdog.close()


def test_closing_ends_the_watch_and_keeps_what_other_ranks_wrote(tmp_path):
    path = tmp_path / "stalled.txt"
    before = threading.active_count()
    watchdog = Watchdog(path, 0, 0.4)
    with pytest.raises(KeyError), watchdog:
        path.write_text("=== of another rank\n")
        raise KeyError
    watchdog.close()
    assert threading.active_count() == before
    time.sleep(1.0)  # past the limit of both threads: this process is still here
    assert path.read_text() == "=== of another rank\n"
