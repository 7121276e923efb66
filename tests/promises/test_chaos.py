"""The chaos script for two minutes, with a constant number of processes and with changing ones; and interrupted."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "helpers/chaos.py"


def _chaos(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "--minutes", "2", "--seed", "5", "--keep", folder, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _output(process: subprocess.Popen, timeout: float) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.terminate()
        process.wait(60)


def _processes_of(folder: Path) -> list[str]:
    """Command lines of the living processes that name `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


@pytest.mark.parametrize("world", [["--constant-world"], []], ids=["constant world", "changing world"])
def test_chaos_for_two_minutes_ends_like_an_undisturbed_run(tmp_path, world):
    process = _chaos(tmp_path / "chaos", *world)
    text = _output(process, timeout=1200)
    assert process.returncode == 0, text[-6000:]
    assert "run 0: ended like the undisturbed one" in text
    assert int(re.search(r"(\d+)  starts\n", text)[1]) > 1, text
    assert not _processes_of(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_chaos_leaves_no_process_behind_when_interrupted(tmp_path, number):
    process = _chaos(tmp_path / "chaos")
    deadline = time.monotonic() + 120
    while len(_processes_of(tmp_path / "chaos")) < 3:  # the script and the processes that it has started
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _output(process, timeout=60)
    assert process.returncode != 0
    assert not _processes_of(tmp_path)
