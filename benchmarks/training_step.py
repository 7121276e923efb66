"""Compare a training step at each patch side with the published way, and the times of both with the FLOPs.

Both ways are bare PyTorch loops over models with equal weights, dropout 0.1 and AdamW. A step is the forward and
backward pass, clipping, the update, and freeing the gradients. Ours is `Transformer` with a fused AdamW; the published
way is `benchmarks.published_step`. Each way runs in a separate process. On a CPU, our process keeps freed memory, as a
training process does; the published way is measured without and with that. All sides and ways take turns, and so does
the update alone (clipping, AdamW, freeing), which takes the same time at every side:

    python -m benchmarks.training_step --out benchmarks/results            # 6 layers, fp32: 5 minutes on 2 idle cores
    python -m benchmarks.training_step --profile --out benchmarks/results  # time of our step by group of operations
    python -m benchmarks.training_step --gpu --out benchmarks/results      # B, batch 256, bf16 autocast

The profile sums the time of groups of operations: host time on a CPU, kernel time on a GPU.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import published_step
from benchmarks.common import (
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
from npp_ds.config.schema import ModelSection
from npp_ds.distributed.process_group import keep_freed_memory
from npp_ds.model import ModelConfig, Transformer, patches
from npp_ds.sizes import num_positions
from npp_ds.training.engine import parameter_groups

HERE, PUBLISHED, PUBLISHED_KEEPING = "this software", "published way", "published way, keeping memory"
UPDATE = "update"
SIDES = (1, 2, 4, 8)
CPU_SIZE = {"dim": 256, "n_layers": 6, "n_heads": 4}
WANTED = {1: 1.1, 2: 1.6, 4: 3.5, 8: 8.0}
CLIP, WEIGHT_DECAY = "clip_gradients", 0.05
GROUPS = (
    ("AdamW", ("Optimizer.step",)),
    ("clipping", (CLIP,)),
    ("head and loss", ("PatchCrossEntropy",)),
    ("embedding tables", ("embedding", "Embedding", "index_select")),
    ("attention kernel", ("scaled_dot_product", "ScaledDotProduct")),
    ("products of the blocks", ("aten::mm", "aten::addmm")),
    ("dropout masks", ("bernoulli", "native_dropout")),
)
"""Groups of operations. An operation is in the first group of which a word is in its name or in a caller's name."""
REST, BETWEEN = "norms, rotation, activation, residuals", "host and waiting"


class Step:
    """A model and its optimizer; `step(codes[B, T], labels[B], patch_side)` takes a training step."""

    def __init__(self, sizes: ModelSection, way: str, device: str):
        torch.manual_seed(0)
        with torch.device(device):
            self.model = Transformer(ModelConfig(**sizes.arguments())).train()
        groups = parameter_groups(self.model, WEIGHT_DECAY)
        self.ours = way == HERE
        if self.ours:
            self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        else:
            self.optimizer = published_step.optimizer(groups)
        on_gpu = device == "cuda"
        self.precision = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()

    def loss(self, codes: Tensor, labels: Tensor, patch_side: int) -> Tensor:
        with self.precision:
            if self.ours:
                return self.model(patches.group(codes, patch_side), labels)
            return published_step.loss(self.model, codes, labels, patch_side)

    def update(self) -> None:
        if self.ours:
            with record_function(CLIP):
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            published_step.update(self.model, self.optimizer)

    def __call__(self, codes: Tensor, labels: Tensor, patch_side: int) -> None:
        self.loss(codes, labels, patch_side).backward()
        self.update()


def ways_of(options: argparse.Namespace) -> tuple[str, ...]:
    return (HERE, PUBLISHED) if options.gpu else (HERE, PUBLISHED, PUBLISHED_KEEPING)


def cases_of(step: Step, codes: Tensor, labels: Tensor) -> dict[int | str, Callable[[], None]]:
    """Return what takes turns: a whole step at each patch side, and UPDATE, the part after the backward pass."""
    step.loss(codes[:1], labels[:1], SIDES[-1]).backward()
    gradients = [(parameter, parameter.grad) for parameter in step.model.parameters()]
    step.update()

    def update() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        step.update()

    return {**{side: partial(step, codes, labels, side) for side in SIDES}, UPDATE: update}


@contextmanager
def at_work(way: str, options: argparse.Namespace) -> Iterator[Callable[[int | str, int], float]]:
    """Yield the function of one way's process: (case of `cases_of`, repetitions) -> seconds per repetition."""
    _, step, codes, labels = set_up(options, way)
    cases, wait = cases_of(step, codes, labels), waiting_for(options.gpu)
    yield lambda case, times: seconds_each(cases[case], times, wait)[0]


def measure(options: argparse.Namespace) -> dict[tuple[int | str, str], list[float]]:
    """Return the seconds of each (case, way) in each turn; a turn repeats short cases."""
    ways = ways_of(options)
    keys = [(case, way) for case in (*SIDES, UPDATE) for way in ways]
    with own_processes(at_work, {way: (way, options) for way in ways}) as ask:
        for case, way in keys:
            ask(way, case, 1)
        times = {(case, way): max(1, round(options.turn_seconds / ask(way, case, 1))) for case, way in keys}
        turns = [{(case, way): ask(way, case, times[case, way]) for case, way in keys} for _ in range(options.repeats)]
    return {key: [turn[key] for turn in turns] for key in keys}


def group_of(event) -> str:
    """Return the group of a profiled operation, from its name and its callers' names."""
    names = []
    while event:
        names.append(event.name)
        event = event.cpu_parent
    return next((group for group, words in GROUPS if any(word in name for name in names for word in words)), REST)


def breakdown(step: Callable[[], None], wait: Callable[[], None], on_gpu: bool) -> dict[str, float]:
    """Return the milliseconds of one step by group of operations; "host and waiting" is the time between operations."""
    wait()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        began = time.perf_counter()
        step()
        wait()
        whole = 1000 * (time.perf_counter() - began)
    groups = dict.fromkeys([*(group for group, _ in GROUPS), REST], 0.0)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            groups[group_of(event)] += own / 1000
    return {**groups, BETWEEN: max(0.0, whole - sum(groups.values()))}


def sizes_of(options: argparse.Namespace) -> ModelSection:
    shape = {"size": "B"} if options.gpu else {**CPU_SIZE, "n_layers": options.layers}
    return ModelSection(**shape, vocab_size=options.vocab_size)


def set_up(options: argparse.Namespace, way: str) -> tuple[ModelSection, Step, Tensor, Tensor]:
    """Return the sizes, the `Step` of a way, and a batch: codes[B, T] and labels[B]."""
    device = "cuda" if options.gpu else "cpu"
    torch.set_num_threads(options.threads)
    if way in (HERE, PUBLISHED_KEEPING) and not options.gpu:
        keep_freed_memory()
    sizes = sizes_of(options)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(options.vocab_size, (options.batch, sizes.grid_size**2), generator=generator)
    labels = torch.randint(sizes.num_classes, (options.batch,), generator=generator)
    return sizes, Step(sizes, way, device), codes.to(device), labels.to(device)


def facts(options: argparse.Namespace, name: str, sizes: ModelSection) -> dict:
    """Return the facts about model and machine that every result contains."""
    return {
        "benchmark": f"{name}_gpu" if options.gpu else name,
        **sizes.shape(),
        "parameters": sizes.parameters(),
        "vocab_size": options.vocab_size,
        "batch": options.batch,
        "precision": "autocast_bf16" if options.gpu else "fp32",
        "repeats": options.repeats,
        "fast": options.fast,
        "machine": {**machine("torch", gpu=options.gpu), **({} if options.gpu else {"threads": options.threads})},
    }


def compare(options: argparse.Namespace) -> dict:
    """Measure all ways and the update of each, and return the result that is printed as JSON."""
    sizes, ways, seconds = sizes_of(options), ways_of(options), measure(options)
    flops = {side: options.batch * sizes.training_flops(num_positions(sizes.grid_size, side)) for side in SIDES}
    rows, here = [], {side: median(seconds[side, HERE]) for side in SIDES}
    for side in SIDES:
        row = {"patch_side": side, "flops": flops[side], "wanted": WANTED[side]}
        row["over_ours"] = {way: in_the_same_turn(seconds[side, way], seconds[side, HERE]) for way in ways[1:]}
        row["seconds"] = {way: spread(seconds[side, way]) for way in ways}
        row["over_side_1"] = {way: row["seconds"][way]["median"] / median(seconds[1, way]) for way in ways}
        row["flops_over_side_1"] = flops[side] / flops[1]
        rows.append(row)
    return {
        **facts(options, "training_step", sizes),
        "sides": rows,
        "update_seconds": {way: spread(seconds[UPDATE, way]) for way in ways},
        "ratios": {
            **{f"published_over_ours_side_{row['patch_side']}": row["over_ours"][PUBLISHED]["median"] for row in rows},
            **{f"side_1_over_side_{side}": here[1] / here[side] for side in SIDES[1:]},
        },
        "wanted": {} if options.gpu else {f"published_over_ours_side_{side}": WANTED[side] for side in SIDES},
    }


def explain(options: argparse.Namespace) -> dict:
    """Profile our step at each side: medians of turns, after a turn that is not profiled."""
    sizes, step, codes, labels = set_up(options, HERE)
    wait = waiting_for(options.gpu)
    ours = {side: partial(step, codes, labels, side) for side in SIDES}
    for take in ours.values():
        take()
    turns = [{side: breakdown(take, wait, options.gpu) for side, take in ours.items()} for _ in range(options.repeats)]
    flops = {side: sizes.training_flops(num_positions(sizes.grid_size, side)) for side in SIDES}
    rows = [
        {
            "patch_side": side,
            "flops_over_side_1": flops[side] / flops[1],
            "milliseconds": {group: median(turn[side][group] for turn in turns) for group in turns[0][side]},
        }
        for side in SIDES
    ]
    return {**facts(options, "training_step_profile", sizes), "sides": rows, "ratios": {}, "wanted": {}}


def table(result: dict) -> str:
    rows, update, gpu = result["sides"], result["update_seconds"], "gpu" in result["machine"]
    bounds = ("", "") if gpu else (f" required | met | {PUBLISHED_KEEPING} / ours |", "---|---|---|")
    lines = [
        f"# A training step at each patch side{' on a GPU' if gpu else ''}",
        "",
        f"{_model(result)} Milliseconds per step, medians of {result['repeats']} turns (lowest .. highest); ratios "
        "are those within a turn.",
        "",
        f"| patch side | {HERE} | {PUBLISHED} | published / ours |{bounds[0]}",
        f"|---|---|---|---|{bounds[1]}",
    ]
    for row in rows:
        times = " | ".join(_milliseconds(row["seconds"][way]) for way in (HERE, PUBLISHED))
        ratios = {
            way: f"{r['median']:.2f} ({r['lowest']:.2f} .. {r['highest']:.2f})" for way, r in row["over_ours"].items()
        }
        met = "yes" if row["over_ours"][PUBLISHED]["median"] >= row["wanted"] else "no"
        bound = "" if gpu else f" {row['wanted']:g} | {met} | {ratios[PUBLISHED_KEEPING]} |"
        lines.append(f"| {row['patch_side']} | {times} | {ratios[PUBLISHED]} |{bound}")
    lines += [
        "",
        "Compared with the FLOPs. The update (clipping, AdamW, freeing gradients) takes the same time at every side: "
        f"alone {_milliseconds(update[HERE])} ms here, {_milliseconds(update[PUBLISHED])} ms in the published way.",
        "",
        f"| patch side | FLOPs over side 1 | step over side 1, {HERE} | {PUBLISHED} | update / step, {HERE} "
        f"| {PUBLISHED} | GFLOP/s, {HERE} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = [f"{update[way]['median'] / row['seconds'][way]['median']:.1%}" for way in (HERE, PUBLISHED)]
        over = [f"{row['over_side_1'][way]:.4f}" for way in (HERE, PUBLISHED)]
        rate = f"{row['flops'] / row['seconds'][HERE]['median'] / 1e9:,.0f}"
        cells = [row["patch_side"], f"{row['flops_over_side_1']:.4f}", *over, *parts, rate]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", made_by(result)]) + "\n"


def profile_table(result: dict) -> str:
    """Format milliseconds by group of operations, and their excess over the time at side 1 times the ratio of FLOPs."""
    rows, gpu = result["sides"], "gpu" in result["machine"]
    lines = [
        f"# Where the time of a training step goes{' on a GPU' if gpu else ''}",
        "",
        f"{_model(result)} Milliseconds of our step in each group of operations, medians of {result['repeats']} "
        "profiled steps; profiling adds a little to each operation. In parentheses: the excess over the time at side 1 "
        "times the ratio of FLOPs.",
        "",
        "| operations | " + " | ".join(f"side {row['patch_side']}" for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    totals = [{**row["milliseconds"], "whole step": sum(row["milliseconds"].values())} for row in rows]
    for group, once in totals[0].items():
        cells = [f"{once:.2f}"]
        for row, found in zip(rows[1:], totals[1:], strict=True):
            cells.append(f"{found[group]:.2f} ({found[group] - once * row['flops_over_side_1']:+.2f})")
        lines.append(f"| {group} | {' | '.join(cells)} |")
    ratios = " | ".join(f"{row['flops_over_side_1']:.4f}" for row in rows)
    return (
        "\n".join(
            [
                *lines,
                f"| FLOPs over side 1 | {ratios} |",
                "",
                made_by({**result, "benchmark": result["benchmark"].replace("_profile", "")}, options=" --profile"),
            ]
        )
        + "\n"
    )


def _model(result: dict) -> str:
    return (
        f"{result['n_layers']} layers, width {result['dim']}, vocabulary {result['vocab_size']:,}, "
        f"{result['parameters'] / 1e6:.1f}M parameters, batches of {result['batch']} maps of 16 x 16 codes, "
        f"{result['precision']}, dropout 0.1."
    )


def _milliseconds(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['median']:.1f} ({1e3 * seconds['lowest']:.1f} .. {1e3 * seconds['highest']:.1f})"


def main() -> None:
    gpu = "measure B at batch 256 in bf16 autocast on the first GPU"
    parser = command_line(__doc__, "batches of 8 and 3 short turns: about a minute", gpu, repeats=5)
    add = parser.add_argument
    add("--profile", action="store_true", help="profile our step by group of operations instead")
    add("--batch", type=int, default=32, help="images per step (%(default)s)")
    add("--layers", type=int, default=6, help="layers of the model on the CPU (%(default)s)")
    add("--vocab-size", type=int, default=16384, help="codes in the codebook (%(default)s)")
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="CPU threads (%(default)s)")
    add("--turn-seconds", type=float, default=1.0, help="approximate seconds of a case in a turn (%(default)s)")
    options = parsed(parser, gpu={"batch": 256}, fast={"batch": 8, "repeats": 3, "turn_seconds": 0.3})
    measured, tabled = (explain, profile_table) if options.profile else (compare, table)
    result = measured(options)
    publish(result, tabled(result), options.out)


if __name__ == "__main__":
    main()
