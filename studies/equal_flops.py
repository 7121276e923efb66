"""Compare next patch prediction with next-token training of equal FLOPs on the same data.

The script trains the quickstart's three-stage run and a next-token run with at least as many FLOPs, for several seeds.
It writes the validation loss of both at patch side 1 as a table and as JSON:

    python studies/equal_flops.py --train SHARDS --val SHARDS --seeds 0 1 2
"""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean

import torch

from npp_ds.config.load import load_config
from npp_ds.config.schema import RunConfig
from npp_ds.data.manifest import Manifest
from npp_ds.sizes import num_positions
from npp_ds.training.metrics import Event, events_named, read_events
from npp_ds.utils.files import write_json_atomic, write_text_atomic

RESULTS = Path(__file__).parent / "results"


def flops_of(config: RunConfig, num_samples: int) -> int:
    """Return the FLOPs of all training steps of a run (forward and backward pass, including attention)."""
    grid = config.model.grid_size
    stages = config.build_schedule(num_samples).stages
    return sum(s.steps * s.batch_size * config.model.training_flops(num_positions(grid, s.patch_side)) for s in stages)


def next_token_overrides(config: RunConfig, num_samples: int, learning_rate: float) -> list[str]:
    """Return the overrides for the last stage alone, with the FLOPs of all stages; its steps are rounded up."""
    last = config.stage_table()[-1]
    steps = -(
        -flops_of(config, num_samples) // (last.batch_size * config.model.training_flops(config.model.grid_size**2))
    )
    stage = f"patch_side: 1, steps: {steps}, learning_rate: {learning_rate}, decay_fraction: {last.decay_fraction}"
    return [f"schedule.stages=[{{{stage}}}]"]


def command_line(description: str, processes: int, out: Path) -> argparse.ArgumentParser:
    """Return a parser with the options of studies that train the quickstart for several seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder of code shards to train on")
    parser.add_argument("--val", required=True, help="folder of held-out code shards")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=processes)
    parser.add_argument("--runs", type=Path, default=Path("runs") / out.name, help="folder for the run folders")
    parser.add_argument("--out", type=Path, default=out, help="result file without its extension")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all runs")
    return parser


def train_quickstart(overrides: list[str], run_dir: Path, processes: int) -> list[Event]:
    """Train a run of the recipe quickstart to its end. Return its events."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "npp_ds", "train", "--recipe", "quickstart", f"run_dir={run_dir}", *overrides]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return read_events(run_dir / "metrics.jsonl")


def train(overrides: list[str], run_dir: Path, processes: int) -> dict[str, float]:
    """Train a run. Return the validation loss at patch side 1 after the last step, and the seconds of training."""
    events = train_quickstart(overrides, run_dir, processes)
    nll = [e["nll"] for e in events_named(events, "validation") if e["patch_side"] == 1][-1]
    return {"validation_nll": nll, "seconds": events_named(events, "end")[-1]["elapsed_seconds"]}


def table(result: dict) -> str:
    lines = [
        "# Three stages against next-token training of equal FLOPs",
        "",
        f"Validation loss at patch side 1, nats per code; {result['images']} training images, seeds {result['seeds']}.",
        "",
        "| run | epochs | FLOPs | validation loss per seed | mean |",
        "|---|---|---|---|---|",
    ]
    for name, arm in result["runs"].items():
        losses = [r["validation_nll"] for r in arm["seeds"]]
        per_seed = ", ".join(f"{x:.4f}" for x in losses)
        lines.append(f"| {name} | {arm['epochs']:.2f} | {arm['flops']:.3g} | {per_seed} | {mean(losses):.4f} |")
    return "\n".join([*lines, "", f"Made by `{result['command']}` with torch {result['torch']}.", ""])


def main() -> None:
    parser = command_line(__doc__, 2, RESULTS / "equal_flops")
    parser.add_argument("--rates", type=float, nargs="+", help="next-token peak rates (that of the last stage)")
    args = parser.parse_args()

    data = [f"data.train={args.train}", f"data.val={args.val}", *args.set]
    images = Manifest.load(args.train).num_samples
    patches = load_config("quickstart", overrides=data)
    arms = {"three stages (sides 4, 2, 1)": data}
    for rate in args.rates or [patches.stage_table()[-1].learning_rate]:
        arms[f"next token, peak rate {rate:g}"] = [*data, *next_token_overrides(patches, images, rate)]
    result = {
        "images": images,
        "seeds": args.seeds,
        "command": " ".join(["python", "studies/equal_flops.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "runs": {},
    }
    for name, overrides in arms.items():
        config = load_config("quickstart", overrides=overrides)
        trained = sum(s.steps * s.batch_size for s in config.build_schedule(images).stages)
        arm = {"epochs": trained / images, "flops": flops_of(config, images), "overrides": overrides, "seeds": []}
        result["runs"][name] = arm
        for seed in args.seeds:
            run_dir = args.runs / f"{len(result['runs'])}-{seed}"
            arm["seeds"].append({"seed": seed, **train([*overrides, f"seed={seed}"], run_dir, args.processes)})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(args.out.with_suffix(".json"), result)
    write_text_atomic(args.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
