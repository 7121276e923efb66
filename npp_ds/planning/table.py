"""Print a plan on the terminal, as tables or as JSON."""

import json

from npp_ds.planning.memory import PARTS
from npp_ds.planning.plan import USABLE_MEMORY, Plan
from npp_ds.utils.format import format_duration, make_table, plain_text

STAGE_COLUMNS = ("patch\nside", "epochs", "steps", "posi-\ntions", "batch", "peak\nrate", "FLOPs", "share")
TIME_COLUMNS = (
    "patch\nside", "micro-\nbatch", "passes", "MFU", "compute\nms", "commu-\nnication\nms", "limit"
)  # fmt: skip
NETWORK_COLUMNS = ("deepspeed.config", "precision", "bytes per\nparameter", "time_cost", "time")
MOST_COLUMNS = 100
"""Width of what is printed beside a terminal."""


def uses_hours(hours: float) -> bool:
    """Return whether a time is written in hours: days only from two on."""
    return hours < 48


def duration(hours: float) -> str:
    if hours < 1:
        return format_duration(hours * 3600)
    return f"{hours:,.1f} hours" if uses_hours(hours) else f"{hours / 24:,.1f} days"


def stage_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return the cells under `STAGE_COLUMNS`: a row per stage, and a last row of totals."""
    rows = [
        (
            str(s.patch_side),
            f"{s.epochs:.4g}",
            f"{s.steps:,}",
            str(s.positions),
            str(s.batch_size),
            f"{s.learning_rate:.3g}",
            f"{s.flops:.3g}",
            f"{s.flops / plan.flops:.1%}",
        )
        for s in plan.stages
    ]
    epochs, steps = sum(s.epochs for s in plan.stages), sum(s.steps for s in plan.stages)
    return [*rows, ("all", f"{epochs:.4g}", f"{steps:,}", "", "", "", f"{plan.flops:.3g}", "100.0%")]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def time_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return the cells under `TIME_COLUMNS`, and the hours or days of the stage."""
    unit = 1 if uses_hours(24 * plan.days) else 24
    return [
        (
            str(s.patch_side),
            str(s.micro_batch_size),
            str(s.gradient_accumulation_steps),
            f"{s.mfu.share:.0%}",
            milliseconds(s.compute_seconds),
            milliseconds(s.communication_seconds),
            s.limit,
            f"{s.hours / unit:,.1f}",
        )
        for s in plan.stages
    ]


def memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return rows of (what, its value with each ZeRO stage), in GB."""
    rows = [
        ("images at a time", *(f"{z.micro_batch_size} at side {z.patch_side}" for z in plan.zero)),
        ("accumulation", *(str(z.gradient_accumulation_steps) for z in plan.zero)),
    ]
    rows += [(part, *(f"{getattr(z.memory, part) / 1e9:.2f}" for z in plan.zero)) for part in (*PARTS, "peak")]
    return [*rows, ("fits", *("yes" if z.fits else "no" for z in plan.zero))]


def network_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return the cells under `NETWORK_COLUMNS`."""
    return [
        (
            f"{n.settings}{' *' if n.is_chosen else ''}",
            n.precision,
            f"{n.bytes_per_parameter:.1f}",
            f"{n.time_cost:.3f}",
            duration(24 * n.days),
        )
        for n in plan.networks
    ]


def mfu_notes(plan: Plan) -> list[str]:
    """Return lines that say where each MFU is from."""
    lines = []
    for origin in ("given", "assumed", "measured"):
        if sides := [str(s.patch_side) for s in plan.stages if s.mfu.origin == origin]:
            lines.append(f"MFU at side {', '.join(sides)}: {origin}{MFU_HINTS[origin]}")
    return lines + list(dict.fromkeys(f"MFU: {s.mfu.source}" for s in plan.stages if s.mfu.source))


MFU_HINTS = {
    "given": "",
    "assumed": "; no measurement of this model on this GPU is available; --mfu gives another",
    "measured": "; it is lower on GPUs that get fewer images per step than was measured",
}


def notes(plan: Plan) -> list[str]:
    """Return the lines below the tables."""
    gpu = plan.gpu
    lines = [
        f"cost, next-token training = 1: {plan.token_cost:.3f} in positions (token_cost), "
        f"{plan.flop_cost:.3f} in FLOPs (flop_cost), {plan.time_cost:.3f} in time (time_cost)",
        f"time: {duration(24 * plan.days)}, {plan.gpu_hours:,.0f} GPU-hours on {plan.gpus} x {gpu.name}",
        f"a step takes the longer of compute, at the MFU's share of {gpu.tflops:g} TFLOP/s, and communication, each "
        f"GPU sending {plan.bandwidth:g} GB/s",
        *mfu_notes(plan),
    ]
    if plan.gpus > 1:
        lines += network_notes(plan)
    if len(plan.batch_scalings) > 1:
        each = [
            f"{v.coarse_batch_scale} takes {duration(24 * v.days)}, {v.gpu_hours:,.0f} GPU-hours, "
            f"time_cost {v.time_cost:.3f}"
            for v in plan.batch_scalings
        ]
        lines.append(f"schedule.coarse_batch_scale (docs/planning.md): {'; '.join(each)}")
    lines.append(
        f"memory: the maximum of each part; fits: a peak of at most {USABLE_MEMORY:.0%} of {gpu.memory_gb:g} GB; "
        f"*: the ZeRO stage of the run, activation checkpointing {plan.activation_checkpointing}"
    )
    return lines


def network_notes(plan: Plan) -> list[str]:
    """Return lines on which settings send least, and from how many GPUs on coarse stages wait even so."""
    best = plan.networks[0]
    if best.is_chosen:
        lines = [f"network: no shipped settings send less than deepspeed.config={best.settings} with {best.precision}"]
    else:
        (own,) = (n for n in plan.networks if n.is_chosen)
        lines = [
            f"network: least is sent with deepspeed.config={best.settings} precision={best.precision}: "
            f"{best.bytes_per_parameter:.1f} instead of {own.bytes_per_parameter:.1f} bytes per parameter and step, "
            f"time_cost {best.time_cost:.3f}, {duration(24 * best.days)}; docs/performance.md has the effect on losses"
        ]
    if best.stalls_from:
        lines.append(
            f"network: from {best.stalls_from} GPUs on, coarse stages wait for the network even so; there larger "
            "coarse batches (schedule.coarse_batch_scale) are the only way to save more time"
        )
    return lines


def print_plan(plan: Plan, as_json: bool = False) -> None:
    """Print the tables and the notes, or one JSON object."""
    if as_json:
        print(json.dumps(plan.as_json()))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = min(console.width, MOST_COLUMNS)
    head = f"{plan.name}: {plan.parameters / 1e6:,.1f}M parameters, {plan.images:,} images ({plan.images_source})"
    console.print(plain_text(f"{head}, {plan.precision}", "bold"))
    console.print(make_table(STAGE_COLUMNS, stage_rows(plan), title="stages"))
    unit = "hours" if uses_hours(24 * plan.days) else "days"
    console.print(make_table((*TIME_COLUMNS, unit), time_rows(plan), title=f"one step, and the {unit} of the stage"))
    zero = (f"ZeRO-{z.zero_stage}{' *' if z.is_chosen else ''}" for z in plan.zero)
    console.print(make_table(("", *zero), memory_rows(plan), title="memory of a GPU in GB"))
    if plan.gpus > 1:
        console.print(
            make_table(NETWORK_COLUMNS, network_rows(plan), title="settings that send less, the fastest first")
        )
    for line in notes(plan):
        console.print(plain_text(line))
