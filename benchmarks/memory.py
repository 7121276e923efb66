"""Compare the measured memory of a training process with the estimate of `npp plan`.

    python -m benchmarks.memory --out benchmarks/results          # on a CPU, about 4 minutes
    python -m benchmarks.memory --gpu --out benchmarks/results    # on one GPU: B to 2B with the shipped settings

On a CPU, the bytes are those of all allocations that PyTorch's profiler records, so they are the same each time. The
other processes are simulated by PyTorch's fake process group, under which the measured process allocates what it would
allocate in a real one. On a GPU, one process runs, and `torch.cuda.max_memory_allocated` of the third step is reported.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.allocations import allocations, peak_bytes
from benchmarks.common import bounds, command_line, machine, made_by, parsed, publish
from npp_ds.config.schema import RunConfig
from npp_ds.distributed.process_group import Processes, join_processes
from npp_ds.planning.memory import training_memory
from npp_ds.sizes import SIZES, num_positions
from npp_ds.training.deepspeed_config import read_settings, shipped_configs
from npp_ds.training.engine import TrainingEngine

STEPS = 3  # the first steps allocate what later ones keep
BUCKET = 1_000_000  # elements; in proportion to models of a few million parameters


@dataclass(frozen=True)
class Case:
    """A run to measure. With `size`, a published model size, it uses the shipped DeepSpeed settings."""

    zero_stage: int = 2
    precision: str = "autocast_bf16"
    world_size: int = 8
    micro_batch: int = 16
    dim: int = 256
    layers: int = 4
    vocab: int = 1024
    patch_side: int = 1
    micro_batches: int = 1
    checkpointing: str = "none"
    ema_decay: float = 0.0
    size: str | None = None


WEIGHTS = Case(micro_batch=4, patch_side=2)
"""Few positions, so that weights, gradients and optimizer state take most of the memory."""
PAIRS = (
    (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "autocast_bf16"), (2, "autocast_bf16"), (3, "autocast_bf16"),
    (2, "bf16"), (3, "bf16"),
)  # fmt: skip
CASES = [
    *(replace(WEIGHTS, zero_stage=z, precision=p) for z, p in PAIRS),
    *(Case(zero_stage=z, precision=p) for z, p in PAIRS[::2] + PAIRS[5:6]),
    *(replace(WEIGHTS, zero_stage=z, world_size=n) for n in (1, 2) for z in (1, 2, 3)),
    *(Case(zero_stage=z, checkpointing=c) for z, c in ((2, "selective"), (1, "block"), (2, "block"), (3, "block"))),
    *(replace(WEIGHTS, zero_stage=z, micro_batches=3) for z in (1, 2, 3)),
    *(Case(zero_stage=z, dim=512, layers=2, vocab=8192, micro_batch=4, ema_decay=0.9) for z in (2, 3)),
]
FAST = [
    Case(zero_stage=2, micro_batch=8),
    replace(WEIGHTS, zero_stage=3, precision="fp32"),
    Case(zero_stage=1, micro_batch=8, checkpointing="block"),
]
GPU_CASES = [
    Case(zero_stage=z, world_size=1, micro_batch=b, patch_side=s, checkpointing=c, size=size)
    for size in SIZES
    for z, b, s, c in (
        (1, 8, 1, "none"), (2, 8, 1, "none"), (3, 8, 1, "none"), (2, 32, 2, "none"), (2, 16, 1, "selective"),
        (2, 16, 1, "block"))
]  # fmt: skip


def config_of(case: Case, folder: Path) -> RunConfig:
    if case.size:
        model, deepspeed = {"size": case.size}, f"zero{case.zero_stage}"
    else:
        model = {"dim": case.dim, "n_layers": case.layers, "n_heads": case.dim // 64, "grid_size": 8}
        model["vocab_size"] = case.vocab
        settings = json.loads(shipped_configs()[f"zero{case.zero_stage}"].read_text())
        zero = settings["zero_optimization"]
        zero.update({key: BUCKET for key in zero if "bucket_size" in key})
        if case.zero_stage == 3:
            zero["stage3_param_persistence_threshold"] = 1000
        deepspeed = str(folder / "settings.json")
        Path(deepspeed).write_text(json.dumps(settings))
    dropout = {f"{what}_dropout": 0.1 for what in ("token", "residual", "ffn")}
    batch = case.micro_batch * case.micro_batches * case.world_size
    stage = {"patch_side": case.patch_side, "epochs": 1}
    schedule = {"stages": [stage], "batch_size": batch, "micro_batch_size": case.micro_batch}
    return RunConfig.model_validate(
        {
            "precision": case.precision,
            "model": {**model, **dropout, "activation_checkpointing": case.checkpointing},
            "data": {"train": "unused"},
            "schedule": {**schedule, "end_at_patch_side_one": False, "warmup_epochs": 0},
            "optimizer": {"ema_decay": case.ema_decay},
            "deepspeed": {"config": deepspeed},
        }
    )


@contextmanager
def constant_weights() -> Iterator[None]:
    """Replace random initialization by a constant: the values do not affect memory, and two billion take a minute."""
    with ExitStack() as stack:
        for name in ("normal_", "uniform_"):
            stack.enter_context(patch.object(torch.Tensor, name, lambda tensor, *_, **__: tensor.fill_(0.02)))
        yield


def steps(config: RunConfig, case: Case, processes: Processes, before_last: Any) -> None:
    """Train `STEPS` steps on random codes; call `before_last` before the last one."""
    model, batch = config.model, case.micro_batch * case.micro_batches * case.world_size
    with constant_weights():
        engine = TrainingEngine(config, config.build_schedule(batch, case.world_size).stages[0], processes)
    generator = torch.Generator().manual_seed(0)
    shape = case.micro_batch, num_positions(model.grid_size, case.patch_side), case.patch_side**2
    codes = torch.randint(model.vocab_size, shape, generator=generator)
    labels = torch.randint(model.num_classes, shape[:1], generator=generator)
    for step in range(STEPS):
        if step == STEPS - 1:
            before_last()
        result = engine.step(step, [(codes, labels)] * case.micro_batches, 1e-4)
        if not result.was_applied:
            raise RuntimeError(f"step {step} of {case} was not applied")


def peak_on_cpu(config: RunConfig, case: Case, processes: Processes) -> int:
    """Return the peak of PyTorch's allocated bytes in the last step."""
    began = []
    changes = allocations(lambda: steps(config, case, processes, lambda: began.append(time.time_ns())))
    return peak_bytes(changes, since=began[0])


def peak_on_gpu(config: RunConfig, case: Case, processes: Processes) -> int:
    steps(config, case, processes, torch.cuda.reset_peak_memory_stats)
    return torch.cuda.max_memory_allocated()


def one_of_many(world_size: int) -> Processes:
    """Make this process rank 0 of a fake process group of `world_size` processes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    torch.distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    return Processes(0, 0, world_size, torch.device("cpu"))


def measure(case: Case, on_gpu: bool) -> dict:
    """Return a case with its peak memory in bytes, measured and estimated."""
    os.environ.setdefault("LOCAL_SIZE", "1")
    processes = join_processes() if on_gpu else one_of_many(case.world_size)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(case, Path(folder))
        zero = read_settings(config.deepspeed.config)["zero_optimization"]
        measured = (peak_on_gpu if on_gpu else peak_on_cpu)(config, case, processes)
    size = case.world_size, case.micro_batch, case.patch_side, case.micro_batches > 1
    expected = training_memory(config, zero, *size, device="cuda" if on_gpu else "cpu").peak
    figures = {"measured": measured, "expected": expected, "ratio": round(expected / measured, 3)}
    return {**asdict(case), "parameters": config.model.parameters(), **figures}


def run(cases: list[Case], on_gpu: bool) -> list[dict]:
    """Measure each case in a new process, which starts with nothing allocated."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["npp_ds.training.engine", "deepspeed"])  # imported once, not once a case
    with context.Pool(1, maxtasksperchild=1) as pool:
        return [pool.apply(measure, (case, on_gpu)) for case in cases]


def table(result: dict) -> str:
    lines = [
        "# Memory of a training process, measured and expected",
        "",
        "Peak memory of a training step in MB. Rows of a GPU's forward pass are micro-batch x positions per image.",
        "",
        "| ZeRO | precision | GPUs | model | rows | accumulated | checkpointing | EMA | measured | expected | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["cases"]:
        grid = 16 if r["size"] else 8
        model = r["size"] or f"{r['dim']} x {r['layers']}, {r['parameters'] / 1e6:.1f}M"
        rows = r["micro_batch"] * num_positions(grid, r["patch_side"])
        lines.append(
            f"| {r['zero_stage']} | {r['precision']} | {r['world_size']} | {model} | {rows:,} | {r['micro_batches']} | "
            f"{r['checkpointing']} | {'yes' if r['ema_decay'] else 'no'} | {r['measured'] / 1e6:,.1f} | "
            f"{r['expected'] / 1e6:,.1f} | {r['ratio']:.3f} |"
        )
    lines += [
        "",
        *bounds(result),
        "",
        "`agreement` is 1 minus the largest distance of a ratio from 1.",
        "",
        made_by(result),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__, fast="the few cases that a test runs", gpu="the published sizes on one GPU")
    args = parsed(parser)
    cases = (GPU_CASES, GPU_CASES[:3]) if args.gpu else (CASES, FAST)
    rows = run(cases[args.fast], args.gpu)
    result = {
        "benchmark": "memory_gpu" if args.gpu else "memory",
        "fast": args.fast,
        "cases": rows,
        "ratios": {"agreement": round(1 - max(abs(1 - row["ratio"]) for row in rows), 3)},
        "wanted": {"agreement": 0.9},
        "machine": machine("torch", "deepspeed", gpu=args.gpu),
    }
    publish(result, table(result), args.out)


if __name__ == "__main__":
    main()
