"""The MFU benchmark: its loops compute the same, a way that fails is told, and the table says what is met."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import mfu as benchmark
from benchmarks.mfu import BARE, ENGINE, Case
from npp_ds.sizes import SIZES, training_flops

SMALL = Case("small", BARE, sides=(2, 1), dropout=0.0)


def rows_of(case: Case, **figures) -> list[dict]:
    """A row for each side; seconds by side, or what failed."""
    rows = []
    for side in case.sides:
        row = {**benchmark.row_of(case, side), "mfu": None, "micro_batch": 256, "model_tflops": 1.0}
        found = {key: value[side] for key, value in figures.items()}
        if "seconds" in found:
            found |= {"lowest": found["seconds"], "highest": found["seconds"]}
        rows.append({**row, "peak_memory_gb": 1.0, **found})
    return rows


@pytest.mark.processes
@pytest.mark.parametrize(
    "other",
    [
        Case("small", ENGINE, sides=(2, 1), dropout=0.0),
        pytest.param(Case("small", BARE, compiled=True, sides=(2, 1), dropout=0.0), marks=pytest.mark.slow),
    ],
)
def test_the_ways_reach_the_same_losses_and_are_timed(other, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plain, found = (benchmark.run_apart(case, 16, 1, 250) for case in (SMALL, other))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in plain], rel=1e-5)
    assert [row["patch_side"] for row in found] == [2, 1]
    for row in (*plain, *found):
        assert row["seconds"] > 0 and row["micro_batch"] == 16 and row["mfu"] is None
        positions = 64 // row["patch_side"] ** 2
        flops = 16 * training_flops(positions, dim=64, n_layers=2, n_heads=2, vocab_size=512)
        assert row["model_tflops"] == pytest.approx(flops / row["seconds"] / 1e12)
    assert plain[0]["loss"] != plain[1]["loss"]


@pytest.mark.processes
def test_a_way_that_fails_has_its_reason(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rows = benchmark.run_apart(Case("small", ENGINE, graphs=True, sides=(2, 1)), 16, 1, 100)
    assert [row["patch_side"] for row in rows] == [2, 1]
    for row in rows:
        assert "performance.cuda_graphs: needs a CUDA device, found none" in row["failed"] and row["mfu"] is None


def test_a_way_without_memory_tries_again_with_fewer_images_and_one_without_time_is_told(monkeypatch):
    tried = []

    def run(command, timeout, **options):
        case = json.loads(command[command.index("--case") + 1])
        tried.append((case["most_images"], timeout))
        if len(tried) == 3:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 1, "", "torch.OutOfMemoryError: CUDA out of memory. Tried\n")

    monkeypatch.setattr(subprocess, "run", run)
    rows = benchmark.run_apart(Case("XXL", ENGINE), 256, 1, 100)
    assert [most for most, _ in tried] == [None, 32]
    assert rows[0]["failed"] == "torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert benchmark.run_apart(SMALL, 256, 1, 100)[0]["failed"] == "not done in 100 s"
    assert [r["failed"] for r in benchmark.run_all([SMALL], 256, 1, minutes=0)] == ["no time left"] * 2


def test_what_is_wanted_is_asked_of_the_fastest_way_of_each_loop_and_said_to_be_met_or_not(
    monkeypatch, tmp_path, capsys
):
    cases = [Case("B", BARE, sides=(8, 4, 2, 1)), Case("B", BARE, True, True, (8, 4, 2, 1)), Case("XXL", ENGINE)]
    figures = {
        cases[0]: {"seconds": {8: 0.02, 4: 0.03, 2: 0.04, 1: 0.1}, "mfu": {8: 0.1, 4: 0.1, 2: 0.2, 1: 0.3}},
        cases[1]: {"seconds": {8: 0.005, 4: 0.007, 2: 0.02, 1: 0.08}, "mfu": {8: 0.1, 4: 0.2, 2: 0.3, 1: 0.43}},
        cases[2]: {"failed": {1: "CUDA error"}},
    }
    monkeypatch.setattr(benchmark, "CPU_CASES", cases)
    monkeypatch.setattr(benchmark, "run_apart", lambda case, *_: rows_of(case, **figures[case]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    benchmark.main(["--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "mfu.json").read_text()) == result
    assert result["wanted"] == pytest.approx(
        {
            "B_bare_compiled_graphs_mfu": 0.42,
            "B_bare_compiled_graphs_side_1_over_side_2": 1 / 0.27,
            "B_bare_compiled_graphs_side_1_over_side_4": 1 / 0.09,
            "B_bare_compiled_graphs_side_1_over_side_8": 1 / 0.045,
        }
    )
    assert result["ratios"]["B_bare_compiled_graphs_side_1_over_side_8"] == pytest.approx(16)
    assert result["ratios"]["B_bare_eager_mfu"] == 0.3
    text = (tmp_path / "mfu.md").read_text()
    assert "| B_bare_compiled_graphs_mfu | 0.420 | 0.430 | yes |" in text
    assert "| B_bare_compiled_graphs_side_1_over_side_8 | 22.222 | 16.000 | no |" in text
    assert "| XXL | 1 | engine eager | | failed: CUDA error |" in text


def test_on_a_gpu_the_published_sizes_run_with_256_images_at_a_time_that_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80_000_000_000, 80_000_000_000))
    chosen = {}
    for case in benchmark.GPU_CASES:
        stages = benchmark.config_of(case, 256).build_schedule(256).stages
        chosen |= {(case.size, case.graphs, s.patch_side): s.micro_batch_size for s in stages}
    assert set(SIZES) >= {size for size, _, _ in chosen}
    assert all(chosen["B", graphs, side] == 256 for graphs in (False, True) for side in (2, 4, 8))
    assert 16 <= chosen["XXL", False, 1] <= 64 <= chosen["B", True, 1]
    fewer = benchmark.config_of(replace(benchmark.GPU_CASES[0], most_images=32), 256)
    assert {s.micro_batch_size for s in fewer.build_schedule(256).stages} == {32}


@pytest.mark.gpu
def test_one_recorded_step_of_the_bare_loop_equals_a_plain_one():
    losses = {}
    for graphs in (False, True):
        case = replace(SMALL, graphs=graphs)
        losses[graphs] = [row["loss"] for row in benchmark.run_case(case, 16, 1)]
    assert losses[True][0] != losses[True][1]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)  # recording takes three steps more


@pytest.mark.gpu
@pytest.mark.parametrize("compiled, graphs", [(False, False), (False, True), (True, False), (True, True)])
def test_the_engine_reaches_the_losses_of_a_plain_loop_on_a_gpu(compiled, graphs):
    case = replace(SMALL, loop=ENGINE, compiled=compiled, graphs=graphs)
    plain, found = (benchmark.run_apart(c, 16, 1, 250) for c in (SMALL, case))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in plain], rel=3e-4)
