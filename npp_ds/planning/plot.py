"""A picture of a planned schedule: patch side, learning rate and cumulative cost over epochs."""

import io
from itertools import accumulate
from pathlib import Path

from npp_ds.errors import UserError
from npp_ds.planning.plan import Plan
from npp_ds.utils.files import check_writable, write_atomic

FORMATS = ("png", "svg", "pdf")
BLUE, RED, GREEN = "#4878a8", "#c44e52", "#55834f"


def write_plot(plan: Plan, path: Path) -> None:
    """Draw the schedule of a plan into a file. Raises UserError if it cannot be written or has another suffix."""
    if path.suffix[1:] not in FORMATS:
        raise UserError(f"--plot {path}: found suffix {path.suffix!r}, expected one of .{', .'.join(FORMATS)}")
    picture = schedule_picture(plan, path.suffix[1:])
    write_atomic(check_writable(path), lambda file: file.write(picture))


def schedule_picture(plan: Plan, image_format: str) -> bytes:
    """Return the picture in one of `FORMATS`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ends = list(accumulate(s.epochs for s in plan.stages))
    starts = [0.0, *ends[:-1]]
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    sides, rates, costs = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1, 1.6])

    edges = [*starts, ends[-1]]
    drawn = [s.patch_side for s in plan.stages]
    sides.step(edges, [*drawn, drawn[-1]], where="post", color=BLUE, linewidth=2)
    sides.set_yscale("log", base=2)
    sides.set_yticks([s.patch_side for s in plan.stages], [f"{s.patch_side}x{s.patch_side}" for s in plan.stages])
    sides.minorticks_off()
    sides.margins(y=0.2)

    xs, ys = [], []
    for s, start, end in zip(plan.stages, starts, ends, strict=True):
        xs += [start, start + s.warmup_epochs, end - s.decay_epochs, end]
        ys += [0.0 if s.warmup_epochs else s.learning_rate, s.learning_rate, s.learning_rate]
        ys.append(s.final_learning_rate if s.decay_epochs else s.learning_rate)
    rates.plot(xs, ys, color=GREEN, linewidth=1.6)
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))

    spent = [0.0, *accumulate(s.flops for s in plan.stages)]
    whole = plan.next_token_flops
    label = f"next-token training: {whole:.3g} FLOPs"
    costs.plot([0, ends[-1]], [0, whole], color=RED, linewidth=1.6, linestyle="--", label=label)
    label = f"this schedule: {plan.flops:.3g} FLOPs, {plan.flop_cost:.3f} of that"
    costs.plot(edges, spent, color=BLUE, linewidth=2, label=label)
    costs.set_ylim(bottom=0)
    costs.legend(frameon=False, loc="upper left")
    costs.set_xlabel("epoch")

    for axis, title in ((sides, "Patch side"), (rates, "Learning rate"), (costs, "Cumulative cost in model FLOPs")):
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlim(0, ends[-1])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        for end in ends[:-1]:
            axis.axvline(end, color="#aaaaaa", linewidth=0.8, linestyle=":")
    name = f"{plan.name}: {plan.parameters / 1e6:,.0f}M parameters, {ends[-1]:g} epochs of {plan.images:,} images"
    figure.suptitle(name, fontsize=12, fontweight="bold")
    picture = io.BytesIO()
    figure.savefig(picture, format=image_format, dpi=110)
    return picture.getvalue()
