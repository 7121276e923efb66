"""Compare steps of `TrainingEngine` (DeepSpeed ZeRO-1, 2 and 3) with a bare PyTorch loop.

    python -m benchmarks.engine --out benchmarks/results          # on a CPU, about 6 minutes
    python -m benchmarks.engine --gpu --out benchmarks/results    # on one GPU: B in autocast

Each way runs in a separate process, because ZeRO-3 replaces functions of PyTorch in its whole process. The ways take
turns: one works while the others wait. All train the same weights on the same codes and must reach the same loss.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from benchmarks.common import (
    bounds,
    command_line,
    in_the_same_turn,
    machine,
    made_by,
    parsed,
    publish,
    seconds_each,
    spread,
    waiting_for,
)
from benchmarks.own_processes import own_processes
from benchmarks.step_loops import BareLoop, EngineLoop, batches_of
from npp_ds.config.schema import RunConfig
from npp_ds.distributed.process_group import leave_processes

BARE = "bare loop"
WAYS = {BARE: None, "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
WANTED = {"ZeRO-1": 0.95, "ZeRO-2": 0.95, "ZeRO-3": 0.90}
SIDES = (1, 2, 4, 8)
SAME_LOSS = {"fp32": 1e-5, "autocast_bf16": 1e-2}
"""Largest relative difference between the losses of two ways after the same number of steps."""


@dataclass(frozen=True)
class Setting:
    """Model, batch size, precision and device; `seconds` is the approximate length of a turn at one side."""

    model: dict
    batch: int
    precision: str
    device: str
    seconds: float


CPU = Setting({"dim": 256, "n_layers": 6, "n_heads": 4}, 32, "fp32", "cpu", 2.0)
FAST = Setting({"dim": 256, "n_layers": 6, "n_heads": 4}, 4, "fp32", "cpu", 0.2)
GPU = Setting({"size": "B"}, 256, "autocast_bf16", "cuda", 1.0)


def config_of(setting: Setting, deepspeed: str) -> RunConfig:
    """Return the config of a run with one stage for each side."""
    stages = [{"patch_side": side, "epochs": 1} for side in SIDES]
    return RunConfig.model_validate(
        {
            "precision": setting.precision,
            "model": setting.model,
            "data": {"train": "unused"},
            "schedule": {
                "stages": stages,
                "batch_size": setting.batch,
                "warmup_epochs": 0,
                "end_at_patch_side_one": False,
            },
            "deepspeed": {"config": deepspeed},
        }
    )


@contextmanager
def at_work(way: str, setting: Setting) -> Iterator[Callable[[int, int], tuple[float, float]]]:
    """Yield the function of one way's process: (index of the side, steps) -> (seconds per step, the last loss)."""
    device = torch.device(setting.device)
    config = config_of(setting, WAYS[way] or "zero2")
    stages = config.build_schedule(setting.batch).stages
    bare = WAYS[way] is None
    loop = BareLoop(config, compiled=False, graphs=False, device=device) if bare else EngineLoop(config, stages[0])
    batches = [batches_of(config, stage, device) for stage in stages]
    wait = waiting_for(device.type == "cuda")

    def train(number: int, steps: int) -> tuple[float, float]:
        seconds, loss = seconds_each(lambda: loop.step(stages[number], batches[number]), steps, wait)
        return seconds, loss.item()

    yield train
    if not bare:
        leave_processes()


def turns(setting: Setting, repeats: int) -> Iterator[tuple[int, dict[str, tuple[float, float]]]]:
    """Yield (side, way -> (seconds per step, loss)) of every turn, after a warm-up at each side."""
    with own_processes(at_work, {way: (way, setting) for way in WAYS}) as ask:
        for number, side in enumerate(SIDES):
            seconds = {way: ask(way, number, 2)[0] for way in WAYS}[BARE]
            count = max(1, round(setting.seconds / seconds))
            for _ in range(repeats):
                yield side, {way: ask(way, number, count) for way in WAYS}


def run(setting: Setting, repeats: int) -> list[dict]:
    """Return a row per side: the spread of each way's milliseconds per step, and of its rate over the bare loop's.

    Raises RuntimeError if the ways do not reach the same losses.
    """
    seconds: dict[int, dict[str, list[float]]] = {side: {way: [] for way in WAYS} for side in SIDES}
    for side, answers in turns(setting, repeats):
        for way, (taken, loss) in answers.items():
            seconds[side][way].append(taken)
            if not math.isclose(loss, answers[BARE][1], rel_tol=SAME_LOSS[setting.precision]):
                raise RuntimeError(f"side {side}: {way} has a loss of {loss}, the bare loop {answers[BARE][1]}")
    return [
        {
            "patch_side": side,
            "milliseconds": {way: spread([1e3 * t for t in values]) for way, values in taken.items()},
            "rate": {way: in_the_same_turn(taken[BARE], taken[way]) for way in WAYS if way != BARE},
        }
        for side, taken in seconds.items()
    ]


def table(result: dict) -> str:
    s = result["setting"]
    model = s["model"].get("size") or f"{s['model']['n_layers']} layers of width {s['model']['dim']}"
    lines = [
        "# Training steps in DeepSpeed's engine and in a bare loop",
        "",
        f"Milliseconds per step, and in parentheses the rate over that of the bare loop, with its range over "
        f"{s['repeats']} turns: one process, {model}, {s['batch']} images per step, {s['precision']}, dropout 0.1.",
        "",
        f"| patch side | {' | '.join(WAYS)} |",
        "|" + "---|" * (1 + len(WAYS)),
    ]
    for row in result["sides"]:
        cells = [f"{row['milliseconds'][BARE]['median']:,.1f}"]
        for way, rate in row["rate"].items():
            figures = f"{rate['median']:.2f}, {rate['lowest']:.2f} .. {rate['highest']:.2f}"
            cells.append(f"{row['milliseconds'][way]['median']:,.1f} ({figures})")
        lines.append(f"| {row['patch_side']} | {' | '.join(cells)} |")
    lines += ["", *bounds(result), "", made_by(result)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__, fast="4 images per step and short turns", gpu="B on the first GPU", repeats=7)
    args = parsed(parser)
    setting = GPU if args.gpu else FAST if args.fast else CPU
    rows = run(setting, args.repeats)
    name = {way: f"{way.lower().replace('-', '')}_side_{{}}" for way in WANTED}
    result = {
        "benchmark": "engine_gpu" if args.gpu else "engine",
        "fast": args.fast,
        "setting": {"repeats": args.repeats, **asdict(setting)},
        "sides": rows,
        "ratios": {
            name[way].format(row["patch_side"]): round(row["rate"][way]["median"], 3) for row in rows for way in WANTED
        },
        "wanted": {name[way].format(1): wanted for way, wanted in WANTED.items()},
        "machine": machine("torch", "deepspeed", gpu=args.gpu),
    }
    publish(result, table(result), args.out)


if __name__ == "__main__":
    main()
