"""Measure step time and model FLOPs utilization (MFU) of training steps in a bare loop and in DeepSpeed's engine.

    python -m benchmarks.mfu --out benchmarks/results          # a small model on the CPU, about 2 minutes
    python -m benchmarks.mfu --gpu --out benchmarks/results    # B and XXL on one GPU, at most 8 minutes

A step is the forward and backward pass of 256 images with dropout 0.1, clipping and AdamW; on a GPU in bf16 autocast.
Its model FLOPs are 6 per matrix parameter and position, plus those of causal attention
(`npp_ds.sizes.training_flops`). The ways are eager, compiled blocks, and compiled blocks with CUDA graphs. In the bare
loop a CUDA graph holds the whole step; in the engine, it holds what `performance.cuda_graphs` captures. Each way runs
in a separate process, in which the patch sides take turns. A way that fails is reported, and the others run. Ways start
in the order of `GPU_CASES` until --minutes have passed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch

from benchmarks.common import command_line, machine, made_by, publish, require_gpu, seconds_each, waiting_for
from benchmarks.step_loops import BareLoop, EngineLoop, batches_of
from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig
from npp_ds.planning.memory import training_memory
from npp_ds.sizes import num_positions
from npp_ds.training.deepspeed_config import read_settings
from npp_ds.training.throughput import peak_tflops
from npp_ds.utils.gpu_specs import gpu_of_device

BARE, ENGINE = "bare", "engine"
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 512, "grid_size": 8}
WANTED_MFU = {"B": 0.42, "XXL": 0.50}
WANTED_SHARES = {BARE: {2: 0.27, 4: 0.09, 8: 0.045}, ENGINE: {2: 0.27, 4: 0.10, 8: 0.08}}
"""Largest accepted ratio of the step time at a side to that at side 1, for B."""
MEMORY_SHARE = 0.85  # largest share of a GPU's memory that the estimate may fill
MOST_SECONDS = 200  # time limit of one case
MEASURED_SECONDS = 0.5  # shortest length of a turn at one side, approximately


@dataclass(frozen=True)
class Case:
    """One way for one model; `most_images` limits the images of a forward pass further than the memory estimate."""

    size: str
    loop: str
    compiled: bool = False
    graphs: bool = False
    sides: tuple[int, ...] = (1,)
    dropout: float = 0.1
    most_images: int | None = None

    @property
    def way(self) -> str:
        return f"{self.loop} {'compiled' if self.compiled else 'eager'}{', CUDA graphs' if self.graphs else ''}"


SIDES = (8, 4, 2, 1)
GPU_CASES = [
    Case("B", ENGINE, compiled=True, graphs=True, sides=SIDES),
    Case("B", BARE, compiled=True, graphs=True, sides=SIDES),
    Case("XXL", ENGINE, compiled=True),
    Case("B", ENGINE, compiled=True, sides=SIDES),
    Case("B", BARE, compiled=True, sides=SIDES),
    Case("XXL", ENGINE),
    Case("B", ENGINE, sides=SIDES),
    Case("B", BARE, sides=SIDES),
    Case("XXL", BARE, compiled=True),
    Case("L", ENGINE, compiled=True),
    Case("XL", ENGINE, compiled=True),
]
CPU_CASES = [Case("small", loop, compiled, sides=(4, 2, 1)) for compiled in (False, True) for loop in (BARE, ENGINE)]


def gpu_name() -> str | None:
    """Return the name of this GPU in `npp plan`, or None."""
    gpu = gpu_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return gpu.name if gpu else None


def config_of(case: Case, batch: int) -> RunConfig:
    """Return the config of a run with one stage per side and the largest micro-batches that are estimated to fit."""
    on_gpu = torch.cuda.is_available()
    sizes = SMALL if case.size == "small" else {"size": case.size}
    keys = {
        "precision": "autocast_bf16" if on_gpu else "fp32",
        "model": {**sizes, **{f"{what}_dropout": case.dropout for what in ("token", "residual", "ffn")}},
        "data": {"train": "unused"},
        "schedule": {"batch_size": batch, "warmup_epochs": 0, "end_at_patch_side_one": False},
        "deepspeed": {"config": "zero2"},
        "performance": {"compile": case.compiled, "cuda_graphs": case.graphs and case.loop == ENGINE},
    }
    config = RunConfig.model_validate(keys)
    zero = read_settings("zero2")["zero_optimization"]
    stages = []
    for side in case.sides:
        images = min(batch, case.most_images or batch)
        while on_gpu and images > 1:
            # A CUDA graph has its own gradients.
            extra = 4 * config.model.parameters() if case.graphs else 0
            peak = training_memory(config, zero, 1, images, side, images < batch).peak + extra
            if peak < MEMORY_SHARE * torch.cuda.mem_get_info()[1]:
                break
            images //= 2
        stages.append({"patch_side": side, "epochs": 1, "micro_batch_size": images})
    keys["schedule"]["stages"] = stages
    return RunConfig.model_validate(keys)


def run_case(case: Case, batch: int, repeats: int) -> list[dict]:
    """Measure steps at all sides in turn. Return a row for each side with its seconds, TFLOP/s and MFU."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = config_of(case, batch)
    stages = config.build_schedule(batch).stages
    bare = case.loop == BARE
    loop = BareLoop(config, case.compiled, case.graphs, device) if bare else EngineLoop(config, stages[0])
    batches = {stage.index: batches_of(config, stage, device) for stage in stages}
    wait = waiting_for(device.type == "cuda")

    def seconds_of(stage: Stage, steps: int) -> tuple[float, float]:
        """Return (seconds per step, loss of the last step)."""
        seconds, loss = seconds_each(lambda: loop.step(stage, batches[stage.index]), steps, wait)
        return seconds, float(loss)

    counts, losses, firsts, seconds = {}, {}, {}, {stage.index: [] for stage in stages}
    for stage in stages:
        firsts[stage.index] = 2 * seconds_of(stage, 2)[0]  # includes compilation and capture
        once, losses[stage.index] = seconds_of(stage, 1)
        counts[stage.index] = max(1, math.ceil(MEASURED_SECONDS / once)) if device.type == "cuda" else 1
    for _ in range(repeats):
        for stage in stages:
            if case.graphs and not bare:
                seconds_of(stage, 1)  # captures again: the engine keeps one stage's CUDA graphs
            seconds_of(stage, 1)
            seconds[stage.index].append(seconds_of(stage, counts[stage.index])[0])
    peak = peak_tflops(device)
    rows = []
    for stage in stages:
        values, positions = seconds[stage.index], num_positions(config.model.grid_size, stage.patch_side)
        tflops = config.model.training_flops(positions) * batch / median(values) / 1e12
        rows.append(
            {
                **row_of(case, stage.patch_side),
                "micro_batch": stage.micro_batch_size,
                "first_two_seconds": firsts[stage.index],
                "seconds": median(values),
                "lowest": min(values),
                "highest": max(values),
                "model_tflops": tflops,
                "mfu": tflops / peak if peak else None,
                "loss": losses[stage.index],
                "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
            }
        )
    return rows


def row_of(case: Case, side: int) -> dict:
    gpu = gpu_name() or (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    return {"size": case.size, "patch_side": side, "way": case.way, "gpu": gpu}


def run_apart(case: Case, batch: int, repeats: int, seconds: float) -> list[dict]:
    """Return the rows of `run_case`, run in a separate process. If that fails, each row has the reason in "failed".

    A case that runs out of memory is tried once more, with an eighth of the batch per forward pass.
    """
    words = ["--case", json.dumps(asdict(case)), "--batch", str(batch), "--repeats", str(repeats)]
    command = [sys.executable, "-m", "benchmarks.mfu", *words]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return [{**row_of(case, side), "mfu": None, "failed": f"not done in {seconds:.0f} s"} for side in case.sides]
    if done.returncode == 0:
        return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[{")))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    left = seconds - (time.perf_counter() - began)
    if any("out of memory" in line for line in lines) and case.most_images is None and left > 30:
        return run_apart(replace(case, most_images=batch // 8), batch, repeats, left)
    reason = next((line for line in reversed(lines) if "Error" in line), lines[-1])
    return [{**row_of(case, side), "mfu": None, "failed": reason[:300]} for side in case.sides]


def run_all(cases: list[Case], batch: int, repeats: int, minutes: float) -> list[dict]:
    """Return the rows of all cases; a case for which no time is left has that as its failure."""
    began, rows = time.perf_counter(), []
    for case in cases:
        left = 60 * minutes - (time.perf_counter() - began)
        if left < 20:
            rows += [{**row_of(case, side), "mfu": None, "failed": "no time left"} for side in case.sides]
            continue
        print(f"{case.size}, {case.way} ..", file=sys.stderr, flush=True)
        rows += run_apart(case, batch, repeats, min(left, MOST_SECONDS))
    return rows


def shares_of(rows: list[dict]) -> dict[tuple[str, str], dict[int, float]]:
    """Return the step time relative to that at side 1, by (size, way) and patch side."""
    seconds: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if "seconds" in row:
            seconds.setdefault((row["size"], row["way"]), {})[row["patch_side"]] = row["seconds"]
    return {
        key: {side: s / by_side[1] for side, s in by_side.items()} for key, by_side in seconds.items() if 1 in by_side
    }


def short_name(size: str, way: str, figure: str) -> str:
    return f"{size}_{way.replace(', CUDA', '').replace(' ', '_')}_{figure}"


def ratios_and_wanted(rows: list[dict]) -> tuple[dict[str, float], dict[str, float]]:
    """Return (ratios, required minimums), larger is better. Only the fastest way of each loop has minimums."""
    ratios, wanted = {}, {}
    shares = shares_of(rows)
    for (size, way), by_side in shares.items():
        for side, share in sorted(by_side.items()):
            if side > 1:
                ratios[short_name(size, way, f"side_1_over_side_{side}")] = 1 / share
    for row in rows:
        if row["mfu"] is not None and row["patch_side"] == 1:
            ratios[short_name(row["size"], row["way"], "mfu")] = row["mfu"]
    for loop, bounds in WANTED_SHARES.items():
        for size, bound in WANTED_MFU.items():
            if (way := fastest_way(rows, size, loop)) is None:
                continue
            found = {short_name(size, way, "mfu"): bound}
            if size == "B":
                found |= {short_name(size, way, f"side_1_over_side_{n}"): 1 / share for n, share in bounds.items()}
            wanted |= {name: value for name, value in found.items() if name in ratios}
    return ratios, wanted


def fastest_way(rows: list[dict], size: str, loop: str) -> str | None:
    """Return the way of this loop with the smallest total step time, among those measured at the most sides."""
    seconds: dict[str, list[float]] = {}
    for row in rows:
        if row["size"] == size and row["way"].startswith(loop) and "seconds" in row:
            seconds.setdefault(row["way"], []).append(row["seconds"])
    return min(seconds, key=lambda way: (-len(seconds[way]), sum(seconds[way]))) if seconds else None


def table(result: dict) -> str:
    rows, shares = result["cases"], shares_of(result["cases"])
    lines = [
        f"# Training steps: MFU and step time{' on a GPU' if result['on_gpu'] else ''}",
        "",
        f"Whole steps of {result['batch']} images, dropout 0.1, clipping, AdamW; medians of {result['repeats']} turns.",
        "",
        "| model | patch side | way | images at a time | ms a step (lowest .. highest) | over side 1 | "
        "model TFLOP/s | MFU | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["size"], r["way"], r["patch_side"])):
        name = f"| {row['size']} | {row['patch_side']} | {row['way']} |"
        if "failed" in row:
            lines.append(f"{name} | failed: {row['failed'].replace('|', '/')} | | | | |")
            continue
        share = shares.get((row["size"], row["way"]), {}).get(row["patch_side"])
        low, mid, high = (row[key] * 1000 for key in ("lowest", "seconds", "highest"))
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "unknown peak"
        memory = f"{row['peak_memory_gb']:.1f}" if row["peak_memory_gb"] is not None else ""
        lines.append(
            f"{name} {row['micro_batch']} | {mid:.1f} ({low:.1f} .. {high:.1f}) | "
            f"{f'{share:.4f}' if share is not None else ''} | {row['model_tflops']:.2f} | {mfu} | {memory} |"
        )
    if result["wanted"]:
        lines += ["", "| required of each loop's fastest way | at least | found | met |", "|---|---|---|---|"]
        for name, bound in result["wanted"].items():
            found = result["ratios"][name]
            lines.append(f"| {name} | {bound:.3f} | {found:.3f} | {'yes' if found >= bound else 'no'} |")
    lines += ["", made_by(result)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    gpu = "measure B and XXL, then L and XL, on the first GPU"
    parser = command_line(__doc__, "only the uncompiled ways", gpu, repeats=5)
    add = parser.add_argument
    add("--batch", type=int, help="images per step (256; on the CPU 16)")
    add("--minutes", type=float, default=8, help="start no way after this many minutes (%(default)s)")
    add("--case", help=argparse.SUPPRESS)  # run one case in this process
    options = parser.parse_args(arguments)
    if options.case:
        keys = json.loads(options.case)
        case = Case(**{**keys, "sides": tuple(keys["sides"])})
        print(json.dumps(run_case(case, options.batch, options.repeats)))
        return
    if options.gpu:
        require_gpu()
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    batch = options.batch or (256 if options.gpu else 16)
    cases = [c for c in (GPU_CASES if options.gpu else CPU_CASES) if not (options.fast and c.compiled)]
    rows = run_all(cases, batch, options.repeats, options.minutes)
    ratios, wanted = ratios_and_wanted(rows)
    result = {
        "benchmark": "mfu_gpu" if options.gpu else "mfu",
        "on_gpu": options.gpu,
        "fast": options.fast,
        "batch": batch,
        "repeats": options.repeats,
        "cases": rows,
        "ratios": ratios,
        "wanted": wanted,
        "machine": machine("torch", "deepspeed", gpu=options.gpu),
    }
    publish(result, table(result), options.out)


if __name__ == "__main__":
    main()
