"""Compare how long checkpoints pause training: ours, synchronous and in a thread, and DeepSpeed's own.

One process saves the whole state of a model (ZeRO-2, fp32), with training steps between and during the saves:

    python -m benchmarks.saving --out benchmarks/results
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import command_line, in_the_same_turn, machine, made_by, parsed, publish
from npp_ds.checkpoint.folders import CheckpointRecord
from npp_ds.checkpoint.saver import CheckpointSaver, Saved
from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig
from npp_ds.distributed.process_group import Processes, join_processes, leave_processes
from npp_ds.training.engine import TrainingEngine

OURS, IN_THREAD, DEEPSPEED = "npp_ds, at once", "npp_ds, asynchronous", "DeepSpeed's save_checkpoint"
GRID, BATCH = 8, 4


def build(processes: Processes, dim: int, layers: int) -> TrainingEngine:
    config = RunConfig.model_validate(
        {
            "precision": "fp32",
            "model": {"dim": dim, "n_layers": layers, "n_heads": dim // 64, "grid_size": GRID, "vocab_size": 16384},
            "data": {"train": "unused"},
            "schedule": {"patch_sides": [1], "epochs": 1, "batch_size": BATCH},
        }
    )
    stage: Stage = config.build_schedule(100 * BATCH).stages[0]
    engine = TrainingEngine(config, stage, processes)
    train(engine, 0)
    return engine


def train(engine: TrainingEngine, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    codes = torch.randint(16384, (BATCH, GRID**2, 1), generator=generator)
    engine.step(step, [(codes, torch.randint(1000, (BATCH,), generator=generator))], 1e-4)


def record_of(engine: TrainingEngine, step: int) -> CheckpointRecord:
    shapes = {name: list(shape) for name, shape in engine.partitions.shapes.items()}
    return CheckpointRecord(step, 0, 1, 2, "fp32", "", "", step, list(engine.state()), shapes)


def ours(engine: TrainingEngine, saver: CheckpointSaver, step: int) -> tuple[float, float, int]:
    """Return (seconds that training was paused, seconds until the checkpoint was complete, bytes)."""
    began = time.perf_counter()
    saver.begin(record_of(engine, step), engine.partitions.fragments, engine.state())
    while saver.asynchronous and not saver.writing.done():
        train(engine, step)
    saved: Saved = saver.finish()
    return saved.seconds_waited, time.perf_counter() - began, saved.bytes


def deepspeed(engine: TrainingEngine, folder: Path, step: int) -> tuple[float, float, int]:
    began = time.perf_counter()
    engine.engine.save_checkpoint(str(folder), tag=str(step), client_state={}, save_latest=False)
    seconds = time.perf_counter() - began
    return seconds, seconds, sum(f.stat().st_size for f in (folder / str(step)).iterdir())


def run(folder: Path, processes: Processes, dim: int, layers: int, repeats: int) -> dict:
    """Save in each way in turn, after an unmeasured round, and return the result that is printed as JSON."""
    engine = build(processes, dim, layers)
    savers = {
        name: CheckpointSaver(folder / name, processes, token="benchmark", asynchronous=name == IN_THREAD)
        for name in (OURS, IN_THREAD)
    }
    figures: dict[str, list[tuple[float, float, int]]] = {OURS: [], IN_THREAD: [], DEEPSPEED: []}
    for turn in range(1, repeats + 2):
        for name in figures:
            train(engine, turn)
            saver = savers.get(name)
            found = ours(engine, saver, turn) if saver else deepspeed(engine, folder / name, turn)
            shutil.rmtree(folder / name)
            if turn > 1:
                figures[name].append(found)
    for saver in savers.values():
        saver.close()
    still = {name: [seconds for seconds, _, _ in values] for name, values in figures.items()}
    return {
        "benchmark": "saving",
        "parameters": sum(torch.Size(shape).numel() for shape in engine.partitions.shapes.values()),
        "repeats": repeats,
        "seconds_stood_still": {name: round(median(values), 3) for name, values in still.items()},
        "range": {name: [round(min(values), 3), round(max(values), 3)] for name, values in still.items()},
        "seconds_to_complete": {n: round(median(total for _, total, _ in v), 3) for n, v in figures.items()},
        "ratios": {
            "at_once_to_deepspeed": round(in_the_same_turn(still[DEEPSPEED], still[OURS])["median"], 3),
            "asynchronous_to_at_once": round(in_the_same_turn(still[OURS], still[IN_THREAD])["median"], 3),
        },
        "megabytes": {name: round(values[0][2] / 1e6) for name, values in figures.items()},
        "machine": machine("torch", "deepspeed"),
    }


def table(result: dict) -> str:
    lines = [
        "# Seconds that a checkpoint pauses training",
        "",
        f"{result['parameters'] / 1e6:.1f}M parameters in fp32 with Adam's moments, one process, ZeRO-2, to a local "
        f"disk; medians of {result['repeats']} turns.",
        "",
        "| way | pauses training | lowest .. highest | complete after | MB |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in result["seconds_stood_still"].items():
        low, high = result["range"][name]
        complete = result["seconds_to_complete"][name]
        lines.append(f"| {name} | {seconds} s | {low} .. {high} | {complete} s | {result['megabytes'][name]} |")
    lines += [
        "",
        "Within these times, our checkpoints are hashed, flushed to disk and committed by a rename; DeepSpeed's are "
        "neither hashed nor flushed. In the asynchronous way, training continues on the same cores during the writing.",
        "",
        made_by(result),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__, fast="a model of width 256", repeats=5)
    parser.add_argument("--dim", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--folder", type=Path, help="folder to save in (default: a temporary folder)")
    args = parsed(parser, fast={"dim": 256})
    os.environ.setdefault("LOCAL_SIZE", "1")
    processes = join_processes()
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            result = run(Path(folder), processes, args.dim, args.layers, args.repeats)
    finally:
        leave_processes()
    result["fast"] = args.fast
    publish(result, table(result), args.out)


if __name__ == "__main__":
    main()
