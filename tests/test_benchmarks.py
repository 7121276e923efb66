"""The benchmarks run as they are documented and print figures of everything that they compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent


def _results(name: str, out: Path, *arguments: str) -> tuple[dict, dict]:
    """(what a small run of a benchmark printed and wrote, what is committed)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((out / f"{name}.json").read_text()) == result
    return result, json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


def test_loader_benchmark_measures_every_reader(tmp_path):
    result, committed = _results("loader", tmp_path, "--images", "1024", "--subset", "512", "--repeats", "2")
    assert list(result["rows_per_second"]) == list(committed["rows_per_second"])
    table = (tmp_path / "loader.md").read_text()
    for name, rate in result["rows_per_second"].items():
        low, high = result["range"][name]
        assert 0 < low <= rate <= high
        assert f"| {name} | {rate:,} |" in table


def test_saving_benchmark_measures_every_way(tmp_path):
    result, committed = _results("saving", tmp_path, "--dim", "64", "--layers", "1", "--repeats", "1")
    assert list(result["seconds_stood_still"]) == list(committed["seconds_stood_still"])
    assert all(seconds > 0 for seconds in result["seconds_stood_still"].values())
    assert result["megabytes"]["npp_ds, at once"] == result["megabytes"]["npp_ds, asynchronous"] > 0
