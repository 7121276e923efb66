"""The benchmarks run as they are documented and print figures of everything that they compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.processes
def test_loader_benchmark_measures_every_reader(tmp_path):
    command = [sys.executable, "-m", "benchmarks.loader", "--images", "1024", "--subset", "512", "--repeats", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "loader.json").read_text()) == result
    committed = json.loads((ROOT / "benchmarks/results/loader.json").read_text())
    assert list(result["rows_per_second"]) == list(committed["rows_per_second"])
    table = (tmp_path / "loader.md").read_text()
    for name, rate in result["rows_per_second"].items():
        low, high = result["range"][name]
        assert 0 < low <= rate <= high
        assert f"| {name} | {rate:,} |" in table


@pytest.mark.processes
def test_saving_benchmark_measures_every_way(tmp_path):
    command = [sys.executable, "-m", "benchmarks.saving", "--dim", "64", "--layers", "1", "--repeats", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--out", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "saving.json").read_text()) == result
    committed = json.loads((ROOT / "benchmarks/results/saving.json").read_text())
    assert list(result["seconds_stood_still"]) == list(committed["seconds_stood_still"])
    assert all(seconds > 0 for seconds in result["seconds_stood_still"].values())
    assert result["megabytes"]["npp_ds, at once"] == result["megabytes"]["npp_ds, asynchronous"] > 0
