"""Pictures by matplotlib: of a run, of a planned schedule, and of a model's likelihood by position."""

import io
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npp_ds.errors import UserError
from npp_ds.planning.plan import Plan
from npp_ds.reporting.curves import Panel, panels
from npp_ds.reporting.summary import RunData
from npp_ds.utils.files import check_writable, write_atomic, write_json_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = ("#e3edf7", "#fdf0dd", "#e6f3e6", "#f3e6f0", "#eeeeee")
BLUE, RED, GREEN, ORANGE = "#4878a8", "#c44e52", "#55834f", "#dd8452"
LOOKS: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.5},
    "dots": {"marker": "o"},
    "dashes": {"marker": "o", "linestyle": "--"},
    "marks": {"marker": "s", "linewidth": 0},
}
"""How matplotlib draws the looks of `Curve`."""


def _new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches, without pyplot and its windows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: "Figure", title: str, image_format: str = "png") -> bytes:
    """Return the picture under a title."""
    figure.suptitle(title, fontsize=12, fontweight="bold")
    picture = io.BytesIO()
    figure.savefig(picture, format=image_format, dpi=110)
    return picture.getvalue()


def plot_run(run: RunData) -> bytes:
    """Return a PNG of a run: the panels of its page over the steps, its stages shaded."""
    shown = panels([run], [run.config.name])
    cells = [panel.key for panel in shown]
    cells += cells[-1:] if len(cells) % 2 else []  # the last one is as wide as two
    rows: list[Any] = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    figure = _new_figure(11, 3.5 * len(rows))
    axes = figure.subplot_mosaic(rows)
    for panel in shown:
        _draw_panel(axes[panel.key], panel)
        _shade(axes[panel.key], run)
    return _saved(figure, run.config.name)


def _draw_panel(axis: "Axes", panel: Panel) -> None:
    for color, curve in zip((BLUE, ORANGE, RED), panel.curves, strict=False):
        look = {"color": color, "markersize": 4, "clip_on": False, "zorder": 3, **LOOKS[curve.look]}
        for number, part in enumerate(curve.parts):
            axis.plot(*np.array([point[:2] for point in part]).T, label="" if number else curve.name, **look)
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    if len(panel.curves) > 1:
        axis.legend(frameon=False, fontsize=9)
    axis.set_title(panel.title, fontsize=11, pad=18)
    axis.set_xlabel("step")
    axis.spines[["top", "right"]].set_visible(False)


def _shade(axis: "Axes", run: RunData) -> None:
    """Shade the steps of each stage and write its patch side above, if there is space."""
    stages = run.schedule.stages
    above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (0, 4), "textcoords": "offset points"}
    for stage in stages:
        axis.axvspan(stage.start_step, stage.end_step, color=SHADES[stage.index % len(SHADES)], zorder=0, linewidth=0)
        if stage.steps > 0.06 * run.schedule.total_steps:
            side, middle = stage.patch_side, (stage.start_step + stage.end_step) / 2
            axis.annotate(f"{side}x{side}", (middle, 1), ha="center", fontsize=9, color="#555555", **above)
    axis.set_xlim(0, run.schedule.total_steps)


FORMATS = ("png", "svg", "pdf")


def write_schedule(plan: Plan, path: Path) -> None:
    """Draw the schedule of a plan into a file. Raises UserError if it cannot be written or has another suffix."""
    if path.suffix[1:] not in FORMATS:
        raise UserError(f"--plot {path}: found suffix {path.suffix!r}, expected one of .{', .'.join(FORMATS)}")
    picture = schedule_picture(plan, path.suffix[1:])
    write_atomic(check_writable(path), lambda file: file.write(picture))


def schedule_picture(plan: Plan, image_format: str) -> bytes:
    """Return the picture in one of `FORMATS`."""
    ends = list(accumulate(s.epochs for s in plan.stages))
    starts = [0.0, *ends[:-1]]
    figure = _new_figure(9, 7.5)
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
    return _saved(figure, name, image_format)


MAPS = (
    ("nats_per_code", "nats per code", "magma"),
    ("top1_accuracy", "top-1 accuracy", "viridis"),
    ("top5_accuracy", "top-5 accuracy", "viridis"),
)
ANNOTATED = 8  # the most cells in a row that have space for their number


def likelihood_picture(result: dict[str, Any]) -> bytes:
    """Return a PNG with three maps of the image's patches, from the result of `evaluation.likelihood.likelihood_of`."""
    figure = _new_figure(13, 4.6)
    for axis, (key, name, colours) in zip(figure.subplots(1, 3), MAPS, strict=True):
        values = np.array(result["by_position"][key])
        shares = key != "nats_per_code"
        shown = axis.imshow(values, cmap=colours)
        figure.colorbar(shown, ax=axis, shrink=0.8, format="{x:.0%}" if shares else "{x:.2f}")
        mean = f"{result[key]:.1%}" if shares else f"{result[key]:.4f}"
        axis.set_title(f"{name}, mean {mean}", fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
        if len(values) <= ANNOTATED:
            middle = (values.min() + values.max()) / 2
            for (row, column), value in np.ndenumerate(values):
                text = f"{value:.0%}" if shares else f"{value:.2f}"
                colour = "white" if value <= middle else "black"
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    weights = result["weights"]
    step = f", step {weights['step']:,}" if weights["step"] is not None else ""
    return _saved(
        figure,
        f"{weights['name']}{step} ({weights['kind']}), {result['images']:,} held-out images at patch side "
        f"{result['patch_side']}: {result['bits_per_image']:,.0f} bits per image",
    )


def write_likelihood(path: Path, result: dict[str, Any]) -> Path:
    """Write the figures to `path` (JSON) and the picture beside it; return the picture's path."""
    picture = likelihood_picture(result)
    png = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(png, lambda file: file.write(picture))
    write_json_atomic(path, result)
    return png
