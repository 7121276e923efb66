"""`make bench` fails on a ratio that was lost, on nothing else, and its baseline changes only when asked to."""

import json
import sys

import pytest

from benchmarks import guard
from benchmarks.guard import changes, compare, decided, entry, read_baseline, verdict
from benchmarks.suite import BENCHMARKS, Benchmark, Outcome
from npp_ds.errors import UserError

MACHINE = {"processor": "P", "cores": 2, "torch": "2"}
BASELINE = {"a": {"x": 10.0, "y": 2.0}, "b": {"z": 1.0}}


def verdicts(findings) -> dict[str, str]:
    return {f"{f.benchmark}.{f.ratio}": f.verdict for f in findings}


def scripted(*runs: dict[str, dict[str, float]]):
    """What `decided` measures with, run after run of each benchmark; and the list of what was measured."""
    asked: list[str] = []

    def measure(name: str) -> dict[str, float]:
        asked.append(name)
        return runs[asked.count(name) - 1][name]

    return measure, asked


@pytest.mark.parametrize("found, is_lost", [(8.4, True), (8.6, False), (10.0, False), (30.0, False)])
def test_a_loss_of_16_percent_fails_and_one_of_14_passes(found, is_lost):
    assert verdict([found] * 3, 10.0) == ("lost" if is_lost else "kept")


@pytest.mark.parametrize(
    "runs, expected",
    [
        ([9], "kept"), ([5], "again"), ([5, 9], "again"), ([5, 5], "lost"), ([5, 9, 9], "kept"), ([5, 9, 5], "lost"),
        ([None], "again"), ([None, 9], "again"), ([None, 9, 9], "kept"), ([None, None], "missing"),
    ],
)  # fmt: skip
def test_two_runs_of_three_decide(runs, expected):
    assert verdict(runs, 10.0) == expected


def test_only_benchmarks_with_a_loss_run_again():
    first = {"a": {"x": 8.0, "y": 2.0}, "b": {"z": 1.0}}
    measure, asked = scripted(first, {"a": {"x": 9.9, "y": 0.5}}, {"a": {"x": 9.9, "y": 2.0}})
    findings = decided(BASELINE, measure, ["a", "b"])
    assert asked == ["a", "b", "a", "a"]
    assert verdicts(findings) == {"a.x": "kept", "a.y": "kept", "b.z": "kept"}
    measure, asked = scripted(first, {"a": {"x": 8.2, "y": 2.0}})
    findings = decided(BASELINE, measure, ["a", "b"])
    assert asked == ["a", "b", "a"]
    assert verdicts(findings) == {"a.x": "lost", "a.y": "kept", "b.z": "kept"}
    assert str(findings[0]) == "LOST    a.x: 8.1, baseline 10, -19.0% (runs: 8, 8.2)"


def test_what_is_missing_is_a_failure_and_what_is_new_is_told_with_the_way_to_add_it():
    measure, _ = scripted(*[{"a": {"x": 10.0, "fresh": 4.0}}] * 3)
    findings = decided(BASELINE, measure, ["a"])
    assert verdicts(findings) == {"a.x": "kept", "a.y": "missing", "a.fresh": "new", "b.z": "missing"}
    texts = [str(f) for f in findings]
    assert texts[1] == "MISSING a.y: not measured; the baseline is 2"
    assert texts[2].endswith("4, not in the baseline: `python -m benchmarks.guard --update --only a` adds it")


def test_a_benchmark_of_which_nothing_is_known_is_all_new():
    assert verdicts(compare({}, {"a": [{"x": 1.0}]})) == {"a.x": "new"}


def test_a_steady_ratio_is_guarded_by_its_median_and_another_by_its_lowest():
    assert entry([2.0, 2.2, 2.1]) == {"ratio": 2.1, "is": "median", "lowest": 2.0, "highest": 2.2, "runs": 3}
    assert entry([2.0, 3.0, 2.1]) == {"ratio": 2.0, "is": "lowest", "lowest": 2.0, "highest": 3.0, "runs": 3}


def test_an_update_says_what_it_lowers_raises_adds_and_removes():
    assert changes("a", {"x": 10.0, "y": 2.0, "gone": 1.0}, {"x": 8.0, "y": 2.5, "fresh": 3.0}) == [
        "LOWERED a.x: 10 -> 8, -20.0%",
        "raised  a.y: 2 -> 2.5, +25.0%",
        "REMOVED a.gone: was 1",
        "added   a.fresh: 3",
    ]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """(the program as a function of its arguments that returns its exit code, the results it measures, its baseline)"""
    results = {"a": {"machine": MACHINE, "ratios": {"x": 10.0, "y": 2.0}, "seconds": 1.0, "rates": {"here": 100}}}
    table = [Benchmark("a", "what a is", 1)]
    baseline = tmp_path / "baseline.json"
    monkeypatch.setattr(guard, "BASELINE", baseline)
    monkeypatch.setattr(guard, "chosen", lambda only, gpu: table)

    def run(benchmark, fast):
        assert fast
        result = results[benchmark.name]
        return Outcome(benchmark, 1.0, result) if result else Outcome(benchmark, 1.0, problem="ended with code 1")

    def main(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["guard", *arguments])
        try:
            guard.main()
        except SystemExit as ended:
            return ended.code
        return 0

    monkeypatch.setattr(guard, "run", run)
    return main, results, baseline


def test_a_loss_ends_with_1_and_is_named_with_both_figures(command, capsys):
    main, results, _ = command
    assert main("--update") == 0
    assert "added   a.x: 10" in capsys.readouterr().out
    assert main() == 0
    results["a"]["ratios"] = {"x": 8.4, "y": 2.0}
    assert main() == 1
    printed = capsys.readouterr().out
    assert "LOST    a.x: 8.4, baseline 10, -16.0% (runs: 8.4, 8.4)" in printed
    assert "1 of 2 ratios kept or new, 1 lost or missing" in printed


def test_seconds_and_rates_are_never_read(command):
    main, results, _ = command
    main("--update")
    results["a"].update(seconds=1000.0, rates={"here": 0.01})
    assert main() == 0
    results["a"].update(seconds=0.001, ratios={"x": 1.0, "y": 2.0})
    assert main() == 1


def test_a_benchmark_that_fails_is_a_failure_and_an_update_then_writes_nothing(command, capsys):
    main, results, baseline = command
    main("--update")
    before = baseline.read_bytes()
    results["a"] = None
    assert main() == 1
    printed = capsys.readouterr().out
    assert "a: ended with code 1" in printed and "MISSING a.x" in printed
    assert main("--update") == 2
    assert "a: a run failed" in capsys.readouterr().err
    assert baseline.read_bytes() == before


def test_a_loss_on_another_machine_is_told_as_such(command, capsys):
    main, results, _ = command
    main("--update")
    results["a"].update(machine={**MACHINE, "torch": "3"}, ratios={"x": 1.0, "y": 2.0})
    assert main() == 1
    assert "a: the baseline is of P, 2 cores, torch 2; this was P, 2 cores, torch 3" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", '{"a": {"ratios": {"x": {"ratio": "fast"}}}}', '{"a": {}}', "[1]"])
def test_a_torn_baseline_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"baseline.json: .*make bench-baseline"):
        read_baseline(path)


def test_the_committed_baseline_is_of_benchmarks_that_exist():
    baseline = json.loads(guard.BASELINE.read_text())
    assert set(baseline) <= {b.name for b in BENCHMARKS}
    for part in baseline.values():
        for found in part["ratios"].values():
            assert found["lowest"] <= found["ratio"] <= found["highest"]
