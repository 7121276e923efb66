"""Compare runs that send gradients in float32 with runs that send them in bf16, over several seeds.

The script trains the quickstart and a run with twice its epochs in the last stage, each with both DeepSpeed settings
and all seeds, on as many CPU processes as `--processes`. It writes the validation losses side by side as a table and
as JSON. Rerun the same command to resume:

    python -m studies.bf16_gradients --train data/fashion_mnist/train --val data/fashion_mnist/val

The engine computes in float32. There the rounding costs most: under bf16 autocast a matrix's gradient is computed in
bf16, so that sending it in bf16 rounds only the sums over processes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import machine, versions, where
from npp_ds.training.metrics import events_named, read_events
from npp_ds.utils.files import write_json_atomic, write_text_atomic

RESULTS = Path(__file__).parent / "results" / "bf16_gradients"
RUNS = {"quickstart": [], "longer": ["schedule.stages.2.epochs=8"]}
SETTINGS = {"fp32": "zero2", "bf16": "zero2_bf16_gradients"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder of code shards to train on")
    parser.add_argument("--val", required=True, help="folder of held-out code shards")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--runs", type=Path, default=Path("runs") / RESULTS.name, help="folder for the run folders")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file without its extension")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all runs")
    return parser.parse_args()


def train(overrides: list[str], run_dir: Path, processes: int) -> list[tuple[int, int, float]]:
    """Train a run of the quickstart to its end. Return (step, patch side, nats per code) of each of its validations."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "npp_ds", "train", "--recipe", "quickstart", f"run_dir={run_dir}", *overrides]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = events_named(read_events(run_dir / "metrics.jsonl"), "validation")
    return [(event["step"], event["patch_side"], event["nll"]) for event in found]


def summary(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Return the differences bf16 - fp32 per seed, their mean, and the standard deviation over seeds of fp32."""
    differences = [b - a for a, b in zip(losses["fp32"], losses["bf16"], strict=True)]
    return {"differences": differences, "mean": mean(differences), "spread_of_seeds": stdev(losses["fp32"])}


def table(result: dict[str, Any]) -> str:
    lines = [
        "# Gradients sent in bf16",
        "",
        f"Validation loss at patch side 1 after the last step, nats per code; Fashion-MNIST, {result['processes']} "
        "processes, ZeRO-2, computed in float32. `zero2` sums gradients over processes in float32, "
        "`zero2_bf16_gradients` rounds them to bf16 first.",
        "",
        "| run | steps | seed | fp32 | bf16 | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in result["runs"].items():
        rows = zip(result["seeds"], run["final"]["fp32"], run["final"]["bf16"], run["differences"], strict=True)
        lines += [f"| {name} | {run['steps']} | {seed} | {a:.4f} | {b:.4f} | {d:+.4f} |" for seed, a, b, d in rows]
    for name, run in result["runs"].items():
        lines += [
            "",
            f"{name}: mean difference {run['mean']:+.4f}; standard deviation over seeds with fp32 gradients "
            f"{run['spread_of_seeds']:.4f}. Largest difference at any validation of the same seed and step: "
            f"{run['largest_difference']:.4f}.",
        ]
    facts = result["machine"]
    return "\n".join([*lines, "", f"{where(facts)}; {versions(facts)}. Made by `{result['command']}`.", ""])


def main() -> None:
    args = parse()
    common = [f"data.train={args.train}", f"data.val={args.val}", "precision=fp32", *args.set]
    result: dict[str, Any] = {
        "seeds": args.seeds,
        "processes": args.processes,
        "command": " ".join(["python -m studies.bf16_gradients", *sys.argv[1:]]),
        "machine": machine("torch", "deepspeed"),
        "runs": {},
    }
    for name, longer in RUNS.items():
        curves: dict[str, list[list[tuple[int, int, float]]]] = {kind: [] for kind in SETTINGS}
        for seed in args.seeds:  # seed by seed: what is there after an interruption is comparable
            for kind, settings in SETTINGS.items():
                overrides = [*common, *longer, f"seed={seed}", f"deepspeed.config={settings}"]
                curves[kind].append(train(overrides, args.runs / f"{name}-{kind}-{seed}", args.processes))
        pairs = [pair for a, b in zip(curves["fp32"], curves["bf16"], strict=True) for pair in zip(a, b, strict=True)]
        final = {kind: [curve[-1][2] for curve in of_kind] for kind, of_kind in curves.items()}
        result["runs"][name] = {
            "overrides": longer,
            "steps": curves["fp32"][0][-1][0],
            "final": final,
            **summary(final),
            "largest_difference": max(abs(b[2] - a[2]) for a, b in pairs),
            "validations": curves,
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(args.out.with_suffix(".json"), result)
    write_text_atomic(args.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
