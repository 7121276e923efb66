"""Compare the ratios of the benchmarks with benchmarks/baseline.json, and fail if one of them has dropped.

    python -m benchmarks.guard                             # all, in their short forms (`make bench`)
    python -m benchmarks.guard --update                    # measure the baseline anew (`make bench-baseline`)
    python -m benchmarks.guard --update --only patch_loss  # only that of one benchmark

A ratio compares two ways that took turns in one run, so it hardly depends on the speed of the machine. Seconds and
rates are not compared. A ratio more than 15 % below its baseline is a loss. Timings are noisy, so a benchmark with a
loss runs again, at most twice, and a ratio counts as lost if two of three runs lose it. One slow run therefore does not
fail the check, and, unlike with the best of three, one fast run does not pass it.

The baseline of a ratio is the median of several runs, or the lowest of them if they differ by more than 15 %.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.common import give_up, versions, where
from benchmarks.suite import ROOT, Benchmark, chosen, run
from npp_ds.errors import UserError
from npp_ds.utils.files import write_json_atomic

BASELINE = ROOT / "benchmarks/baseline.json"
TOLERANCE = 0.15
"""Largest relative loss that passes, and largest relative difference of runs whose median is the baseline."""
VOTES = 2
"""Number of runs, of at most three, that decide."""

Ratios = Mapping[str, Mapping[str, float]]
"""benchmark -> ratio -> value."""


@dataclass(frozen=True)
class Finding:
    """The verdict on one ratio: "kept", "lost", "missing", "new", or "again" while more runs are needed.

    `runs` holds its value in each run, None where the run did not give it. `baseline` is None for a new ratio.
    """

    benchmark: str
    ratio: str
    verdict: str
    runs: tuple[float | None, ...]
    baseline: float | None = None

    def __str__(self) -> str:
        name = f"{self.verdict.upper():<8}{self.benchmark}.{self.ratio}"
        if self.verdict == "missing":
            return f"{name}: not measured; the baseline is {self.baseline:.4g}"
        known = [value for value in self.runs if value is not None]
        if self.verdict == "new":
            return f"{name}: {known[0]:.4g}, not in the baseline: `{update_command(self.benchmark)}` adds it"
        change = median(known) / self.baseline - 1
        runs = f" (runs: {', '.join('none' if v is None else f'{v:.4g}' for v in self.runs)})" if self.runs[1:] else ""
        return f"{name}: {median(known):.4g}, baseline {self.baseline:.4g}, {change:+.1%}{runs}"


def update_command(benchmark: str) -> str:
    return f"python -m benchmarks.guard --update --only {benchmark}"


def verdict(runs: Sequence[float | None], baseline: float) -> str:
    """Return the verdict on a ratio's values in one to three runs; if the first run loses it, two of three decide."""
    lost = [value is None or value < (1 - TOLERANCE) * baseline for value in runs]
    if not lost[0] or lost.count(False) == VOTES:
        return "kept"
    if lost.count(True) < VOTES:
        return "again"
    return "missing" if all(value is None for value in runs) else "lost"


def compare(baseline: Ratios, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Finding]:
    """Return a finding for each ratio of the baseline and of `runs` (benchmark -> the ratios of each of its runs)."""
    findings = []
    for benchmark in dict.fromkeys([*baseline, *runs]):
        guarded, measured = baseline.get(benchmark, {}), runs.get(benchmark, [{}] * VOTES)
        for ratio, value in guarded.items():
            values = tuple(found.get(ratio) for found in measured)
            findings.append(Finding(benchmark, ratio, verdict(values, value), values, value))
        for ratio, value in measured[0].items():
            if ratio not in guarded and value is not None:
                findings.append(Finding(benchmark, ratio, "new", (value,)))
    return findings


def decided(
    baseline: Ratios, measure: Callable[[str], Mapping[str, float]], benchmarks: Iterable[str]
) -> list[Finding]:
    """Measure each benchmark, and measure those with a loss again until every verdict is final."""
    runs = {name: [measure(name)] for name in benchmarks}
    while True:
        findings = compare(baseline, runs)
        again = dict.fromkeys(f.benchmark for f in findings if f.verdict == "again")
        if not again:
            return findings
        for name in again:
            runs[name].append(measure(name))


def entry(values: Sequence[float]) -> dict[str, float | int | str]:
    """Return the baseline entry of a ratio, from its values in several runs."""
    low, high = min(values), max(values)
    steady = high <= (1 + TOLERANCE) * low
    ratio = median(values) if steady else low
    return {"ratio": ratio, "is": "median" if steady else "lowest", "lowest": low, "highest": high, "runs": len(values)}


def changes(benchmark: str, old: Mapping[str, float], new: Mapping[str, float]) -> list[str]:
    """Return a line for each ratio of a benchmark that an update removes, adds, lowers or raises."""
    lines = []
    for ratio in dict.fromkeys([*old, *new]):
        name = f"{benchmark}.{ratio}"
        if ratio not in new:
            lines.append(f"REMOVED {name}: was {old[ratio]:.4g}")
        elif ratio not in old:
            lines.append(f"added   {name}: {new[ratio]:.4g}")
        else:
            change = new[ratio] / old[ratio] - 1
            lines.append(
                f"{'LOWERED' if change < 0 else 'raised '} {name}: {old[ratio]:.4g} -> {new[ratio]:.4g}, {change:+.1%}"
            )
    return lines


def read_baseline(path: Path) -> dict[str, dict]:
    """Return benchmark -> {machine, ratios}, or {} if there is no file. Raises UserError if the file is malformed."""
    if not path.exists():
        return {}
    try:
        baseline = json.loads(path.read_text())
        for name, part in baseline.items():
            for ratio, value in part["ratios"].items():
                if not value["ratio"] > 0:
                    raise ValueError(f"{name}.{ratio}: ratio is {value['ratio']!r}, expected more than 0")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a baseline: {error!r}; restore it, or delete it and measure with `make bench-baseline`"
        ) from error
    return baseline


def ratios_of(baseline: Mapping[str, dict]) -> dict[str, dict[str, float]]:
    return {name: {ratio: e["ratio"] for ratio, e in part["ratios"].items()} for name, part in baseline.items()}


def measured(benchmark: Benchmark) -> tuple[dict, dict[str, float]]:
    """Return (machine, ratios) of one run in the short form; print the problem and return empty ones if it fails."""
    outcome = run(benchmark, fast=True)
    print(f"{benchmark.name}: {outcome.problem or 'measured'} ({outcome.seconds:.0f} s)", flush=True)
    return (outcome.result["machine"], outcome.result.get("ratios", {})) if outcome.result else ({}, {})


def update(benchmark: Benchmark, baseline: dict[str, dict], runs: int) -> dict[str, dict]:
    """Measure a benchmark's baseline, print the changes and return the new one. Raises UserError if a run fails."""
    found = [measured(benchmark) for _ in range(runs)]
    machine, names = found[0]
    if any(not here or set(ratios) != set(names) or None in ratios.values() for here, ratios in found):
        raise UserError(f"{benchmark.name}: a run failed or had other ratios than the first; its baseline is unchanged")
    entries = {name: entry([ratios[name] for _, ratios in found]) for name in names}
    before = ratios_of(baseline).get(benchmark.name, {})
    baseline = {**baseline, benchmark.name: {"machine": machine, "ratios": entries}}
    print("\n".join(changes(benchmark.name, before, ratios_of(baseline)[benchmark.name])), flush=True)
    return baseline


def check(benchmarks: Sequence[Benchmark], baseline: dict[str, dict], all_of_them: bool) -> bool:
    """Measure the benchmarks, print the verdict on each ratio, and return whether no ratio was lost or missing."""
    by_name = {b.name: b for b in benchmarks}
    guarded = {name: r for name, r in ratios_of(baseline).items() if all_of_them or name in by_name}
    machines: dict[str, dict] = {}

    def measure(name: str) -> dict[str, float]:
        machines[name], ratios = measured(by_name[name])
        return ratios

    findings = decided(guarded, measure, by_name)
    print()
    for finding in sorted(findings, key=lambda f: f.verdict != "kept"):
        print(finding)
    for name in dict.fromkeys(f.benchmark for f in findings if f.verdict == "lost"):
        if machines[name] != baseline[name]["machine"]:
            here, there = described(machines[name]), described(baseline[name]["machine"])
            print(f"{name}: the baseline is of {there}; this was {here}")
    failed = [f for f in findings if f.verdict in ("lost", "missing")]
    print(f"\n{len(findings) - len(failed)} of {len(findings)} ratios kept or new, {len(failed)} lost or missing")
    return not failed


def described(machine: Mapping) -> str:
    """Return a machine and its versions as text, "nothing" if the benchmark failed."""
    return f"{where(machine)}, {versions(machine)}" if machine else "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="measure the baseline again and print the changes")
    parser.add_argument("--runs", type=int, default=5, help="runs of each benchmark for --update (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these benchmarks")
    options = parser.parse_args()
    try:
        benchmarks, baseline = chosen(options.only, gpu=False), read_baseline(BASELINE)
        for benchmark in benchmarks if options.update else ():
            baseline = update(benchmark, baseline, options.runs)
            write_json_atomic(BASELINE, baseline)
        if not options.update and not check(benchmarks, baseline, all_of_them=not options.only):
            sys.exit(1)
    except UserError as error:
        give_up(str(error))


if __name__ == "__main__":
    main()
