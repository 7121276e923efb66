"""Measure what a step sends between nodes and when, and the time of a schedule on a network as slow as a cluster's.

The network is slowed until its speed, relative to compute, is that of a cluster.

    python -m benchmarks.network --out benchmarks/results          # as root, about 12 minutes on two idle cores

Each node is a network namespace of this machine (`benchmarks/nodes.py`) with one training process of one thread. A
trace of the collectives gives operations, dtypes and elements; the counters of the nodes' interfaces give the bytes
that gloo sent for them. What NCCL's ring algorithms would send for the same collectives follows by formula (`PASSES`):
gloo's own reductions to one process and its reduce-scatter send more. The same trace says which gradients are sent
while others are still to be computed: only these can be sent during the backward pass.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import bounds, command_line, give_up, machine, made_by, parsed, publish, seconds_each
from benchmarks.nodes import INTERFACE, Node, Nodes, start_ranks, wait_for_all, why_no_nodes
from npp_ds.config.schema import ModelSection, RunConfig
from npp_ds.planning.plan import make_plan
from npp_ds.sizes import SIZES
from npp_ds.utils.gpu_specs import find_gpu

PASSES = {"allreduce_": 2, "reduce_": 1, "_allgather_base_": 1, "_reduce_scatter_base_": 1}
"""Collective -> number of passes of its ring algorithm in NCCL: in each, n ranks send (n - 1) / n of the buffer."""
REDUCTIONS = ("allreduce_", "reduce_", "_reduce_scatter_base_")
BYTES = {"float32": 4, "bfloat16": 2}
MODEL = {"dim": 256, "n_layers": 4, "n_heads": 4, "vocab_size": 2048, "grid_size": 8, "num_classes": 10}
TIMED_ROWS = 16
"""Images of a process and step where time is measured."""
SIDES = (1, 2, 4, 8)
SCHEDULES = {"two levels": (0.5, 0.5, 0, 0), "four levels": (0.5, 0.25, 0.125, 0.125)}
"""Shares of the steps by side, of `schedule.patch_sides` [2, 1] and [8, 4, 2, 1]."""
GPUS = (8, 16, 32, 64)
MFU = 0.4
BUCKETS = (200_000_000, 50_000_000)
"""Elements of a bucket whose effect on the overlap is shown: 200M, and 50M as shipped."""
OVERLAP_LAYERS = 24
TURNS = 3
TRACED_STEPS = 3
LAUNCH_SECONDS = 600
WANTED = {"autocast_now": 12 / 8, "bf16_engine_bf16_gradients": 10 / 5}
"""At most 8 bytes per parameter and step with autocast, from 12, and at most 5 in the bf16 engine, from 10."""


@dataclass(frozen=True)
class Way:
    """What is measured: settings of ds_configs/, with all-reduced gradients or as shipped, and a kind of step."""

    settings: str
    precision: str = "autocast_bf16"
    accumulation: int = 1
    all_reduced: bool = False
    sides: tuple[int, ...] = (1,)
    rows: int = 4
    """Images of a process and step."""
    layers: int = MODEL["n_layers"]
    bucket: float = 0
    """Elements of a bucket of gradients, as a share of the parameters; 0: those of the settings."""

    def config(self, nodes: int, folder: Path) -> RunConfig:
        """Return the config of a run with one stage per side; its DeepSpeed settings are written to `folder`."""
        settings = json.loads((Path("ds_configs") / f"{self.settings}.json").read_text())
        if self.all_reduced:
            settings["zero_optimization"]["use_multi_rank_bucket_allreduce"] = True  # DeepSpeed's default (0.19.8)
        model = ModelSection.model_validate({**MODEL, "n_layers": self.layers})
        if self.bucket:
            settings["zero_optimization"]["reduce_bucket_size"] = int(self.bucket * model.parameters())
        file = folder / "deepspeed.json"
        file.write_text(json.dumps(settings))
        schedule = {
            "stages": [{"patch_side": side, "epochs": 1} for side in self.sides],
            "batch_size": self.rows * nodes,
            "micro_batch_size": self.rows // self.accumulation,
            "warmup_epochs": 0,
            "end_at_patch_side_one": False,
        }
        return RunConfig.model_validate(
            {
                "precision": self.precision,
                "model": model.model_dump(),
                "data": {"train": "unused"},
                "schedule": schedule,
                "deepspeed": {"config": str(file)},
            }
        )


TRACED = tuple(
    Way(settings, precision, accumulation, all_reduced)
    for settings, precision, all_reduced in (
        ("zero1", "autocast_bf16", True),
        ("zero1", "autocast_bf16", False),
        ("zero2", "autocast_bf16", True),
        ("zero2", "autocast_bf16", False),
        ("zero2_bf16_gradients", "autocast_bf16", False),
        ("zero2", "bf16", True),
        ("zero2", "bf16", False),
        ("zero2_bf16_gradients", "bf16", False),
        ("zero3", "autocast_bf16", False),
        ("zero3", "bf16", False),
    )
    for accumulation in (1, 4)
)


def interface_bytes() -> int:
    """Return the bytes that this process's node has sent, as its kernel counts them."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if INTERFACE in line)
    return int(line.split(":")[1].split()[8])


def watch_collectives(work: Callable[[], Any], see: Callable[[str, Any], None]) -> None:
    """Call `see(operation, largest tensor)` for each collective of `work`, in order."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "c10d":
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                see(function._opname, max(tensors, key=torch.Tensor.numel))
            return function(*args, **(kwargs or {}))

    with Collectives():
        work()


def collectives_of(work: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Return the elements that each (operation, dtype) has in the collectives of `work`, by its largest tensor."""
    found: Counter[tuple[str, str]] = Counter()

    def count(operation: str, tensor: Any) -> None:
        found[operation, str(tensor.dtype).removeprefix("torch.")] += tensor.numel()

    watch_collectives(work, count)
    return found


def early_share(work: Callable[[], Any], model: Any) -> float:
    """Return the share of the gradients' elements that a step, `work`, sends before the last gradient is computed."""
    waiting = sum(p.numel() for p in model.parameters())
    sent = {True: 0, False: 0}

    def computed(gradient: Any) -> None:
        nonlocal waiting
        waiting -= gradient.numel()

    def count(operation: str, tensor: Any) -> None:
        if operation in REDUCTIONS:
            sent[waiting > 0] += tensor.numel()

    hooks = [p.register_hook(computed) for p in model.parameters()]
    watch_collectives(work, count)
    for hook in hooks:
        hook.remove()
    return sent[True] / sum(sent.values())


def nccl_bytes(counted: Iterable[tuple[str, str, float]]) -> float:
    """Return the bytes of (operation, dtype, elements) by NCCL's rings, times n / (n - 1)."""
    return sum(PASSES[operation] * BYTES[dtype] * count for operation, dtype, count in counted)


def at_work(way: Way, task: str) -> dict[str, Any]:
    """Run one process of a launch: what it sends in a step (`task` "trace"), or seconds per step at each side."""
    import torch
    import torch.distributed as dist

    from benchmarks.step_loops import EngineLoop, batches_of

    world_size = int(os.environ["WORLD_SIZE"])
    with tempfile.TemporaryDirectory() as folder:
        config = way.config(world_size, Path(folder))
        stages = config.build_schedule(config.schedule.batch_size, world_size).stages
        loop = EngineLoop(config, stages[0])
    answer: dict[str, Any] = {"parameters": config.model.parameters()}
    for stage in stages:
        batches = batches_of(config, stage, torch.device("cpu"))[: way.accumulation]
        for _ in range(2):
            loop.step(stage, batches)
        dist.barrier()
        began = interface_bytes()
        seconds, _ = seconds_each(lambda s=stage, b=batches: loop.step(s, b), TRACED_STEPS, lambda: None)
        answer.setdefault("sent_bytes", (interface_bytes() - began) / TRACED_STEPS)
        answer.setdefault("seconds", []).append(seconds)
    if task == "trace":
        counted = collectives_of(lambda: loop.step(stages[0], batches))
        answer["collectives"] = [[*key, count] for key, count in sorted(counted.items())]
        answer["early_share"] = early_share(lambda: loop.step(stages[0], batches), loop.engine.engine.module)
    dist.barrier()
    return answer


def launch(nodes: Sequence[Node], way: Way, task: str) -> list[dict[str, Any]]:
    """Start one process per node for `at_work`; return their answers by rank. Raises RuntimeError if one fails."""
    arguments = ["-W", "ignore", "-m", "benchmarks.network", "--process", json.dumps([task, asdict(way)])]
    processes = start_ranks(nodes, [sys.executable, *arguments], nodes[0].address, stdout=subprocess.PIPE, text=True)
    codes = wait_for_all(processes, LAUNCH_SECONDS)
    printed = [process.communicate()[0].strip().splitlines() for process in processes]
    if any(codes):
        raise RuntimeError(f"{way}: the processes ended with {codes}; their errors are printed above")
    return [json.loads(lines[-1]) for lines in printed]


def traced(nodes: Sequence[Node], way: Way) -> dict[str, Any]:
    """Return what a step of one way sends, in bytes per parameter, normalised by n / (n - 1)."""
    answers, n = launch(nodes, way, "trace"), len(nodes)
    parameters = answers[0]["parameters"]
    large = [
        (op, dtype, count / parameters) for op, dtype, count in answers[0]["collectives"] if count > 1e-3 * parameters
    ]
    return {
        **asdict(way),
        "nodes": n,
        "collectives": [{"operation": op, "dtype": dtype, "per_parameter": round(c, 3)} for op, dtype, c in large],
        "gloo_bytes": round(sum(a["sent_bytes"] for a in answers) / (n - 1) / parameters, 2),
        "nccl_bytes": round(nccl_bytes(large), 2),
    }


def overlap(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Return, by size of the model and of the buckets, the share of gradients that are sent during a backward pass.

    The buckets of a small model with many layers hold the same share of its parameters as those of a large one.
    """
    rows = []
    for size in SIZES:
        parameters = ModelSection.model_validate({"size": size}).parameters()
        for bucket in BUCKETS:
            way = Way("zero2", layers=OVERLAP_LAYERS, bucket=bucket / parameters)
            shares = [answer["early_share"] for answer in launch(nodes, way, "trace")]
            rows.append({"size": size, "bucket": bucket, "early_share": round(min(shares), 3)})
    return rows


@dataclass(frozen=True)
class Emulated:
    """Two nodes whose links are as slow, relative to their computing, as those of `gpus` H100s that train XXL."""

    gpus: int
    ratio: float
    megabits: float


def ratio_of_cluster(gpus: int) -> float:
    """Return communication over compute of a step at side 1 of XXL on so many H100s, with all-reduced gradients.

    The plan assumes an MFU of 40 %. A step sends 12 bytes per parameter: in float32, the gradient twice and the weight
    once.
    """
    config = RunConfig.model_validate({"model": {"size": "XXL"}, "data": {"train": "unused"}})
    gpu = find_gpu("h100", None, None, None)
    stage = make_plan(config, gpu, gpus, MFU).stages[-1]
    sent = 12 * config.model.parameters() * (gpus - 1) / gpus
    return sent / (gpu.bandwidth(gpus) * 1e9) / stage.compute_seconds


def timed(nodes: Sequence[Node], way: Way, megabits: float) -> list[float]:
    """Return the median seconds of a step at each of the way's sides, with links of this rate (0: unlimited)."""
    for node in nodes:
        node.limit_rate(1e6 * megabits)
    turns = [
        [max(pair) for pair in zip(*(a["seconds"] for a in launch(nodes, way, "time")), strict=True)]
        for _ in range(TURNS)
    ]
    return [median(values) for values in zip(*turns, strict=True)]


def emulate(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Return a row per emulated cluster and way to send gradients: seconds per side, cost of each schedule."""
    before = Way("zero2", "fp32", all_reduced=True, sides=SIDES, rows=TIMED_ROWS)
    after = replace(before, settings="zero2_bf16_gradients")
    fast = timed(nodes, before, 0)
    sent = launch(nodes, replace(before, sides=(1,)), "time")
    rows = []
    for gpus in GPUS:
        ratio = ratio_of_cluster(gpus)
        seconds = ratio * fast[0]  # that the link is to need for a step of `before`
        megabits = 8e-6 * max(answer["sent_bytes"] for answer in sent) / seconds
        for way, share in ((before, 1.0), (after, 8 / 12)):
            measured = timed(nodes, way, megabits)
            overlapped = [max(compute, share * seconds) for compute in fast]
            added = [compute + share * seconds for compute in fast]
            rows.append(
                {
                    "gpus": gpus,
                    "ratio": round(ratio, 3),
                    "megabits_per_second": round(megabits, 1),
                    "gradients": "bf16" if way is after else "fp32",
                    "seconds": dict(zip(map(str, SIDES), measured, strict=True)),
                    "cost": {name: cost(shares, measured) for name, shares in SCHEDULES.items()},
                    "planned": {name: cost(shares, overlapped) for name, shares in SCHEDULES.items()},
                    "planned_without_overlap": {name: cost(shares, added) for name, shares in SCHEDULES.items()},
                }
            )
    return rows


def cost(shares: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the time of a schedule relative to steps at side 1, from its shares of the steps by side."""
    return round(sum(share * s for share, s in zip(shares, seconds, strict=True)) / seconds[0], 3)


def table(result: dict[str, Any]) -> str:
    m = result["model"]
    lines = [
        "# What a training step sends",
        "",
        f"Bytes per parameter and optimizer step that each of n nodes sends, divided by (n - 1) / n; one process per "
        f"node, {m['n_layers']} layers of width {m['dim']} ({result['parameters'] / 1e6:.1f}M parameters). `gloo`: "
        "counted at the nodes' interfaces, headers included. `NCCL`: the same collectives by the formulas of ring "
        "algorithms; NCCL was not run.",
        "",
        "| settings | gradients | engine | micro-batches | nodes | collectives, elements per parameter | gloo | NCCL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["bytes"]:
        done = ", ".join(
            f"{c['operation'].strip('_')} {c['dtype']} x {c['per_parameter']:g}" for c in row["collectives"]
        )
        how = "all-reduced" if row["all_reduced"] else "as shipped"
        lines.append(
            f"| {row['settings']} | {how} | {row['precision']} | {row['accumulation']} | {row['nodes']} | {done} "
            f"| {row['gloo_bytes']:.2f} | {row['nccl_bytes']:.2f} |"
        )
    if result["overlap"]:
        lines += [
            "",
            "# What can be sent during the backward pass",
            "",
            "Share of the gradients' elements whose reduction ZeRO-2 starts before the last gradient is computed, in a "
            f"trace of one micro-batch; a model of {OVERLAP_LAYERS} layers of width {m['dim']} whose buckets hold as "
            "large a share of its parameters as in the named size. The rest is sent after the backward pass.",
            "",
            f"| size | {' | '.join(f'buckets of {bucket / 1e6:,.0f}M' for bucket in BUCKETS)} |",
            "|" + "---|" * (1 + len(BUCKETS)),
        ]
        by_size = {size: [r["early_share"] for r in result["overlap"] if r["size"] == size] for size in SIZES}
        lines += [f"| {size} | {' | '.join(f'{share:.0%}' for share in shares)} |" for size, shares in by_size.items()]
    lines += ["", *bounds(result)]
    if result["schedules"]:
        lines += [
            "",
            "# Time of a schedule on a slow network",
            "",
            "Two nodes, float32, ZeRO-2. `tc` limits both links so that a step at side 1 with all-reduced float32 "
            "gradients communicates for as long, relative to its computing, as XXL on that many H100s does by plan. "
            "Costs are relative to next-token training on the same images and network: measured / planned with full "
            "overlap, as `npp plan` assumes / planned without overlap. With bf16 gradients gloo sends 8 instead of 12 "
            "bytes per parameter.",
            "",
            f"| H100s | communication / compute | Mbit/s | gradients | ms at side {', '.join(map(str, SIDES))} "
            f"| {' | '.join(SCHEDULES)} |",
            "|" + "---|" * (5 + len(SCHEDULES)),
        ]
        for row in result["schedules"]:
            taken = ", ".join(f"{1e3 * t:,.0f}" for t in row["seconds"].values())
            costs = (
                f"{row['cost'][name]:.2f} / {row['planned'][name]:.2f} / {row['planned_without_overlap'][name]:.2f}"
                for name in SCHEDULES
            )
            figures = (f"{row['gpus']}", f"{row['ratio']:.2f}", f"{row['megabits_per_second']:,.0f}", row["gradients"])
            lines.append(f"| {' | '.join([*figures, taken, *costs])} |")
        lines += [
            "",
            "Two cores serve both nodes and the network between them, and on a CPU the backward pass waits for each "
            "reduction: compare the measured costs with the plan without overlap.",
        ]
    return "\n".join([*lines, "", made_by(result)]) + "\n"


def main() -> None:
    args = parsed(command_line(__doc__, fast="only what the ratios compare: two nodes, one micro-batch, ZeRO-2"))
    if reason := why_no_nodes():
        give_up(f"python -m benchmarks.network: {reason}")
    with Nodes(2) as nodes:
        compared = [way for way in TRACED if way.accumulation == 1 and way.settings.startswith("zero2")]
        found = [traced(nodes, way) for way in (compared if args.fast else TRACED)]
        early = [] if args.fast else overlap(nodes)
        schedules = [] if args.fast else emulate(nodes)
    if not args.fast:
        with Nodes(4) as nodes:
            found += [traced(nodes, way) for way in TRACED if way.accumulation == 1 and way.settings != "zero1"]
    sent = {
        (row["settings"], row["precision"], row["all_reduced"]): row["nccl_bytes"]
        for row in found
        if row["accumulation"] == 1
    }
    ratios = {
        "autocast_now": sent["zero2", "autocast_bf16", True] / sent["zero2", "autocast_bf16", False],
        "bf16_engine_bf16_gradients": sent["zero2", "bf16", True] / sent["zero2_bf16_gradients", "bf16", False],
    }
    result = {
        "benchmark": "network",
        "fast": args.fast,
        "model": MODEL,
        "parameters": ModelSection.model_validate(MODEL).parameters(),
        "bytes": found,
        "overlap": early,
        "schedules": schedules,
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "wanted": WANTED,
        "machine": machine("torch", "deepspeed"),
    }
    publish(result, table(result), args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        task_name, fields = json.loads(sys.argv[2])
        print(json.dumps(at_work(Way(**{**fields, "sides": tuple(fields["sides"])}), task_name)))
    else:
        main()
