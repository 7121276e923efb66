"""Runs the benchmarks one after the other and sums up what they found beside what is wanted.

    python -m benchmarks                                     # all that need no GPU
    python -m benchmarks --gpu --out benchmarks/results      # all that measure a GPU, on the first one
    python -m benchmarks --only loader sampling --fast       # some of them, in their short forms

Each runs in a process of its own. One that fails or takes too long is told, and the rest goes on; it ends with 1 then.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import give_up, ratio_rows, require_gpu, where
from benchmarks.suite import BENCHMARKS, PATIENCE, Outcome, chosen, run
from npp_ds.errors import UserError


def listing() -> str:
    """All benchmarks with their minutes, for --help."""
    lines = [
        f"minutes on two CPU cores, and with --gpu on an H100; a benchmark is ended after {PATIENCE} times as long:"
    ]
    for b in BENCHMARKS:
        gpu = "-" if b.gpu_minutes is None else f"{b.gpu_minutes:g}"
        lines.append(f"  {b.name:<14}{b.minutes:>4g}{gpu:>5}   {b.measures}")
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome], fast: bool = False) -> str:
    """Every ratio beside what is wanted, what failed, and where all of it was measured."""
    lines = ["# Summary", "", "| benchmark | ratio | measured | wanted | |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        rows = [("", "", "", "**failed**")] if outcome.result is None else ratio_rows(outcome.result)
        lines += ["| " + " | ".join((outcome.benchmark.name, *row)) + " |" for row in rows]
    verdicts = [verdict for o in outcomes if o.result for *_, verdict in ratio_rows(o.result) if verdict]
    failed = [o.benchmark.name for o in outcomes if o.result is None]
    lines += ["", f"Larger is better. {verdicts.count('met')} of {len(verdicts)} bounds met."]
    if fast:
        lines.append("These were the short forms; what is wanted is stated for the full ones.")
    machines: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.result:
            machines.setdefault(where(outcome.result["machine"]), []).append(outcome.benchmark.name)
    lines += [f"Measured on {place}: {', '.join(names)}." for place, names in machines.items()]
    if failed:
        lines.append(f"Failed: {', '.join(failed)}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", action="store_true", help="those that measure a GPU, on the first one")
    parser.add_argument("--fast", action="store_true", help="their short forms")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--out", type=Path, help="folder for every NAME.md and NAME.json (with --gpu NAME_gpu.*)")
    options = parser.parse_args()
    try:
        benchmarks = chosen(options.only, options.gpu)
    except UserError as error:
        give_up(str(error))
    if options.gpu:
        require_gpu()
    outcomes = []
    for number, benchmark in enumerate(benchmarks, start=1):
        minutes = benchmark.gpu_minutes if options.gpu else benchmark.minutes
        about = "" if options.fast else f", about {minutes:g} min"
        print(f"[{number}/{len(benchmarks)}] {benchmark.name}: {benchmark.measures}{about}", flush=True)
        outcome = run(benchmark, options.gpu, options.fast, options.out)
        print(f"{outcome.table or 'FAILED: ' + outcome.problem}\n({outcome.seconds:.0f} s)\n", flush=True)
        outcomes.append(outcome)
    print(summary(outcomes, options.fast))
    sys.exit(any(outcome.result is None for outcome in outcomes))


if __name__ == "__main__":
    main()
