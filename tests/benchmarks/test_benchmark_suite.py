"""`python -m benchmarks` runs every benchmark to its end, whatever becomes of one of them."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import common, suite
from benchmarks.suite import BENCHMARKS, Benchmark, Outcome
from forks import run_forked
from npp_ds.errors import UserError

ROOT = Path(__file__).parents[2]
RESULT = {
    "benchmark": "good",
    "machine": {"processor": "P", "cores": 2, "torch": "2"},
    "ratios": {"here_to_there": 2.0, "small_to_large": 0.5, "told": 3.0},
    "wanted": {"here_to_there": 1.5, "small_to_large": 0.6},
}


def a_benchmark(folder: Path, name: str, code: str) -> None:
    (folder / "benchmarks").mkdir(exist_ok=True)
    (folder / "benchmarks/__init__.py").touch()
    (folder / "benchmarks" / f"{name}.py").write_text(code)


def good(name: str, result: dict) -> str:
    writes = "(out / '{n}.json').write_text('''{r}'''); (out / '{n}.md').write_text('# table\\n')"
    lines = ["import sys", "from pathlib import Path", "out = Path(sys.argv[sys.argv.index('--out') + 1])"]
    return "\n".join([*lines, writes.format(n=name, r=json.dumps(result))])


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """A suite of one that works, one that fails and one that never ends."""
    a_benchmark(tmp_path, "good", good("good", RESULT))
    a_benchmark(tmp_path, "broken", "raise SystemExit('no such luck')")
    a_benchmark(tmp_path, "endless", "import time\nprint('still here', flush=True)\ntime.sleep(600)")
    table = (Benchmark("broken", "what breaks", 1), Benchmark("endless", "time", 1 / 30), Benchmark("good", "it", 1, 1))
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "BENCHMARKS", table)
    return table


@pytest.mark.processes
def test_the_rest_runs_when_one_fails_or_never_ends(benchmarks, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--out", str(out)])
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 1
    assert time.monotonic() - started < 60
    printed = capsys.readouterr().out
    for line in (
        "FAILED: ended with code 1\n    no such luck",
        "FAILED: ended after its time limit of 0.1 minutes\n    still here",
        "| broken |  |  |  | **failed** |",
        "| good | here_to_there | 2 | 1.5 | met |",
        "| good | small_to_large | 0.5 | 0.6 | **not met** |",
        "| good | told | 3 |  |  |",
        "1 of 2 bounds met.",
        "Measured on P, 2 cores: good.",
        "Failed: broken, endless.",
    ):
        assert line in printed
    assert sorted(p.name for p in out.iterdir()) == ["good.json", "good.md"]
    assert json.loads((out / "good.json").read_text()) == RESULT


@pytest.mark.processes
def test_all_that_succeed_end_with_0_and_only_what_is_named_runs(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "good", "--fast"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "[1/1] good: it\n# table" in printed
    assert "These were the short forms" in printed


@pytest.mark.processes
def test_a_time_limit_ends_what_the_benchmark_started_too(tmp_path, monkeypatch):
    started = tmp_path / "started"
    lines = ["import subprocess", "child = subprocess.Popen(['sleep', '600'])"]
    lines += [f"open({str(started)!r}, 'w').write(str(child.pid))", "child.wait()"]
    a_benchmark(tmp_path, "parent", "\n".join(lines))
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    outcome = suite.run(Benchmark("parent", "", 1 / 30))
    assert outcome.result is None
    status = Path(f"/proc/{started.read_text()}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()


def test_gpu_without_a_gpu_is_one_clear_error():
    for module in ("benchmarks.__main__", "benchmarks.memory"):
        done = run_forked(module, "--gpu")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.strip() == common.NO_GPU


def test_what_is_asked_for_must_exist():
    with pytest.raises(UserError, match="--only nonsense: no such benchmark; there are patch_loss, "):
        suite.chosen(["nonsense"], gpu=False)
    with pytest.raises(UserError, match="--only saving: no --gpu mode"):
        suite.chosen(["saving", "memory"], gpu=True)
    assert all(b.gpu_minutes for b in suite.chosen(None, gpu=True))
    assert suite.chosen(None, gpu=False) == list(BENCHMARKS)


def test_the_table_of_benchmarks_is_what_the_folder_holds():
    """Every module that has a `--fast`, and its `--gpu` where there is one."""
    about_benchmarks = {"__main__", "common", "suite", "guard", "gpu_check", "gpu_parts"}
    texts = {p.stem: p.read_text() for p in (ROOT / "benchmarks").glob("*.py") if p.stem not in about_benchmarks}
    programs = {name: text for name, text in texts.items() if "__main__" in text}
    assert {b.name for b in BENCHMARKS} == set(programs)
    for b in BENCHMARKS:
        assert ("gpu=" in programs[b.name] or "--gpu" in programs[b.name]) == (b.gpu_minutes is not None), b.name
        assert b.gpu_minutes is None or b.gpu_minutes <= 10


def test_a_ratio_that_was_not_measured_meets_no_bound():
    result = {**RESULT, "ratios": {"here_to_there": None}}
    assert common.ratio_rows(result) == [("here_to_there", "not measured", "1.5", "**not met**")]
    text = program.summary([Outcome(BENCHMARKS[0], 1.0, result, "table")])
    assert "0 of 1 bounds met." in text


def test_ways_take_turns_after_an_unmeasured_round():
    order = []

    def way(name: str, count: int):
        return lambda: order.append(name) or count

    rates = common.rates_in_turn({"a": way("a", 1), "b": way("b", 2)}, repeats=2)
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in rates.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_of_those_within_a_turn():
    # Every turn twice as fast as the other, whatever the machine did meanwhile.
    assert common.in_the_same_turn([2, 20, 6], [1, 10, 3]) == {"median": 2, "lowest": 2, "highest": 2}
    assert common.in_the_same_turn([3, 20, 6], [1, 10, 4])["median"] == 2


def test_other_defaults_with_fast_yield_to_what_is_given(monkeypatch):
    def options(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        parser = common.command_line("about", fast="less", repeats=5)
        parser.add_argument("--images", type=int, default=100)
        return common.parsed(parser, fast={"images": 10, "repeats": 3})

    assert (options().images, options().repeats) == (100, 5)
    assert (options("--fast").images, options("--fast").repeats) == (10, 3)
    assert options("--fast", "--images", "7").images == 7
