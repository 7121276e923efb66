"""Print a plan on the terminal, as tables or as JSON."""

import json

from npp_ds.planning.memory import PARTS
from npp_ds.planning.plan import USABLE_MEMORY, Plan
from npp_ds.utils.tables import make_table, plain_text

STAGE_COLUMNS = ("patch side", "epochs", "steps", "positions", "batch", "peak rate", "FLOPs", "share")
TIME_COLUMNS = ("patch side", "micro-batch", "accumulation", "MFU", "compute", "communication", "limit", "hours")
MEMORY_COLUMNS = ("ZeRO", "micro-batch", "accumulation", *PARTS, "peak", "fits")


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
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def time_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return the cells under `TIME_COLUMNS`: milliseconds of one step, hours of the stage."""
    return [
        (
            str(s.patch_side),
            str(s.micro_batch_size),
            str(s.gradient_accumulation_steps),
            f"{s.mfu.share:.0%} {s.mfu.origin}",
            milliseconds(s.compute_seconds),
            milliseconds(s.communication_seconds),
            s.limit,
            f"{s.hours:,.1f}",
        )
        for s in plan.stages
    ]


def memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Return the cells under `MEMORY_COLUMNS`, in GB; the run's own ZeRO stage is marked."""
    return [
        (
            f"{z.zero_stage}{' *' if z.is_chosen else ''}",
            f"{z.micro_batch_size} at side {z.patch_side}",
            str(z.gradient_accumulation_steps),
            *(f"{getattr(z.memory, part) / 1e9:.2f}" for part in (*PARTS, "peak")),
            "yes" if z.fits else "no",
        )
        for z in plan.zero
    ]


def mfu_notes(plan: Plan) -> list[str]:
    """Return lines that say where each MFU is from."""
    lines = [f"MFU: {s.mfu.source}" for s in plan.stages if s.mfu.source]
    if lines:
        lines.append("MFU: lower on GPUs that get fewer images per step than was measured")
    if any(s.mfu.origin == "assumed" for s in plan.stages):
        lines.append("MFU: assumed where no measurement of this model on this GPU is available; --mfu gives another")
    return list(dict.fromkeys(lines))


def notes(plan: Plan) -> list[str]:
    """Return the lines below the tables."""
    gpu = plan.gpu
    lines = [
        f"cost, next-token training = 1: {plan.token_cost:.3f} in positions (token_cost), "
        f"{plan.flop_cost:.3f} in FLOPs (flop_cost), {plan.time_cost:.3f} in time (time_cost)",
        f"time: {plan.days:.2f} days, {plan.gpu_hours:,.0f} GPU-hours on {plan.gpus} x {gpu.name}; a step takes the "
        f"longer of compute, at the MFU's share of {gpu.tflops:g} TFLOP/s, and communication, each GPU sending "
        f"{gpu.bandwidth(plan.gpus):g} GB/s",
        f"memory: the maximum of each part; fits: a peak of at most {USABLE_MEMORY:.0%} of "
        f"{gpu.memory_gb:g} GB; *: the ZeRO stage of the run, activation checkpointing {plan.activation_checkpointing}",
    ]
    lines[2:2] = mfu_notes(plan)
    if len(plan.levers) > 1:
        each = [
            f"with {v.coarse_batch_scale} {v.days:.2f} days, {v.gpu_hours:,.0f} GPU-hours, time_cost {v.time_cost:.3f}"
            for v in plan.levers
        ]
        lines.append(f"schedule.coarse_batch_scale (docs/planning.md): {'; '.join(each)}")
    return lines


def memory_warning(plan: Plan) -> str | None:
    """Return a warning if the run as configured does not fit the memory of the GPU."""
    if not any(z.fits for z in plan.zero if z.is_chosen):
        return (
            "the run does not fit this GPU, even one image at a time; use another ZeRO stage, "
            "model.activation_checkpointing=block, or more GPUs"
        )
    if all(s.micro_batch_size >= s.configured_micro_batch_size for s in plan.stages):
        return None
    most, configured = (
        min(getattr(s, name) for s in plan.stages) for name in ("micro_batch_size", "configured_micro_batch_size")
    )
    return (
        f"{configured} images at a time, as configured, do not fit; the plan is for the largest that do: "
        f"set schedule.micro_batch_size={most}"
    )


def print_plan(plan: Plan, as_json: bool = False) -> None:
    """Print the tables and the notes, or one JSON object."""
    if as_json:
        print(json.dumps(plan.as_json()))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160
    head = f"{plan.name}: {plan.parameters / 1e6:,.1f}M parameters, {plan.images:,} images ({plan.images_source})"
    console.print(plain_text(f"{head}, {plan.precision}", "bold"))
    console.print(make_table(STAGE_COLUMNS, stage_rows(plan), title="stages"))
    console.print(make_table(TIME_COLUMNS, time_rows(plan), title="one step"))
    console.print(make_table(MEMORY_COLUMNS, memory_rows(plan), title="memory of a GPU in GB"))
    for line in notes(plan):
        console.print(plain_text(line), soft_wrap=True)
