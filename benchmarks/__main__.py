"""Run the benchmarks one after the other and compare each ratio with its required minimum.

    python -m benchmarks                                     # all that need no GPU
    python -m benchmarks --gpu --out benchmarks/results      # all that have a GPU mode, on the first GPU
    python -m benchmarks --only loader sampling --fast       # these two, in their short forms

Each benchmark runs in a separate process with a time limit. If one fails or exceeds its limit, the command reports it,
runs the others, and exits with code 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import give_up, ratio_rows, require_gpu, where
from benchmarks.suite import BENCHMARKS, PATIENCE, Outcome, chosen, run
from npp_ds.errors import UserError


def listing() -> str:
    """Return a line for each benchmark with its expected minutes, for --help."""
    lines = [
        f"expected minutes on two CPU cores, and with --gpu on an H100; the time limit is {PATIENCE} times as long:"
    ]
    for b in BENCHMARKS:
        gpu = "-" if b.gpu_minutes is None else f"{b.gpu_minutes:g}"
        lines.append(f"  {b.name:<14}{b.minutes:>4g}{gpu:>5}   {b.measures}")
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome], fast: bool = False) -> str:
    """Return Markdown: each ratio beside its required minimum, the benchmarks that failed, and the machines."""
    lines = ["# Summary", "", "| benchmark | ratio | measured | required | |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        rows = [("", "", "", "**failed**")] if outcome.result is None else ratio_rows(outcome.result)
        lines += ["| " + " | ".join((outcome.benchmark.name, *row)) + " |" for row in rows]
    verdicts = [verdict for o in outcomes if o.result for *_, verdict in ratio_rows(o.result) if verdict]
    failed = [o.benchmark.name for o in outcomes if o.result is None]
    lines += ["", f"Larger is better. {verdicts.count('met')} of {len(verdicts)} bounds met."]
    if fast:
        lines.append("These were the short forms; the required minimums apply to the full ones.")
    machines: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.result:
            machines.setdefault(where(outcome.result["machine"]), []).append(outcome.benchmark.name)
    lines += [f"Measured on {name}: {', '.join(names)}." for name, names in machines.items()]
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
    parser.add_argument("--gpu", action="store_true", help="run the benchmarks that have a GPU mode, on the first GPU")
    parser.add_argument("--fast", action="store_true", help="run their short forms")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these benchmarks")
    parser.add_argument("--out", type=Path, help="folder for each NAME.md and NAME.json (with --gpu: NAME_gpu.*)")
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
