"""What reports draw: curves of runs, for the page's script and for matplotlib, and pictures of plans and results."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npp_ds.errors import UserError
from npp_ds.planning.plan import Plan
from npp_ds.reporting.summary import RunData
from npp_ds.training.metrics import Event, events_named
from npp_ds.training.throughput import step_flops
from npp_ds.utils.files import check_writable, write_atomic, write_json_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 150
"""Most points of a curve in one stage; with more lines, each stands for a bin of equally many."""
TIME_UNITS = ((180, 1, "seconds"), (7200, 60, "minutes"), (float("inf"), 3600, "hours"))
FLOP_UNITS = {1e12: "TFLOPs", 1e15: "PFLOPs", 1e18: "EFLOPs", 1e21: "ZFLOPs", 1e24: "YFLOPs"}


@dataclass(frozen=True)
class Curve:
    """A curve of run number `run`; `parts` hold points [step, value], or [step, mean, least, largest] of a bin.

    `look` is "line", "dots" (a line with a dot at each point), "dashes" or "marks" (no line).
    """

    run: int
    name: str
    look: str
    parts: list[list[list[float]]]


@dataclass(frozen=True)
class Panel:
    """Curves with one vertical axis, which begins at zero if `from_zero`."""

    key: str
    title: str
    curves: list[Curve]
    from_zero: bool = False


def _rounded(values: Iterable[float], digits: int = 5) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def binned(lines: Sequence[Event], name: str) -> list[list[float]]:
    """Return at most MOST_POINTS points of a figure; lines without it, or where it is not finite, are left out."""
    known = [(e["step"], e[name]) for e in lines if e.get(name) is not None and isfinite(e[name])]
    bins = np.array_split(np.array(known, np.float64).reshape(-1, 2), min(MOST_POINTS, max(1, len(known))))
    if len(bins) == len(known):
        return [[int(step), *_rounded([value])] for step, value in known]
    return [[round(b[:, 0].mean()), *_rounded([b[:, 1].mean(), b[:, 1].min(), b[:, 1].max()])] for b in bins if len(b)]


def axis_knots(run: RunData) -> np.ndarray:
    """Return float64 [knots, 4] of step, epochs, FLOPs and seconds of training, between which all grow linearly.

    FLOPs are those of the model for all images (`npp_ds.sizes.training_flops`), of all processes together.
    """
    stages, model = run.schedule.stages, run.config.model
    flops = [s.steps * step_flops(model, s, s.patch_side) for s in stages]
    ends = [0, *(s.end_step for s in stages)]
    lines = run.lines
    spaced = lines[:: max(1, len(lines) // MOST_POINTS)]
    last = lines[-1]["step"]
    steps = np.array(sorted({*(end for end in ends if end <= last), *(e["step"] for e in spaced), last}), np.float64)
    seconds = np.interp(steps, [0, *(e["step"] for e in lines)], [0, *(e["elapsed_seconds"] for e in lines)])
    epochs = np.interp(steps, ends, np.cumsum([0.0, *(s.steps / s.steps_per_epoch for s in stages)]))
    return np.stack([steps, epochs, np.interp(steps, ends, np.cumsum([0.0, *flops])), seconds], axis=1)


def _by_stage(run: RunData, name: str) -> list[list[list[float]]]:
    parts = (binned(lines, name) for lines in run.lines_by_stage)
    return [part for part in parts if part]


def _points(events: list[Event], name: str, at_side_1: bool) -> list[list[list[float]]]:
    points = binned([e for e in events if (e["patch_side"] == 1) == at_side_1], name)
    return [points] if points else []


def panels(runs: Sequence[RunData], names: Sequence[str]) -> list[Panel]:
    """Return the panels that have a curve; with several runs each curve has the name of its run."""

    def panel(key: str, title: str, *kinds: tuple[str, str, Any], from_zero: bool = False) -> Panel:
        curves = []
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            for what, look, parts_of in kinds:
                called = what if len(runs) == 1 else f"{name}, {what}" if len(kinds) > 1 else name
                if parts := parts_of(run):
                    curves.append(Curve(number, called, look, parts))
        return Panel(key, title, curves, from_zero)

    def points(event: str, name: str, at_side_1: bool) -> Any:
        return lambda run: _points(events_named(run.events, event), name, at_side_1)

    def trained(name: str) -> Any:
        return lambda run: _by_stage(run, name)

    found = [
        panel(
            "validation",
            "Validation, nats per code",
            ("at patch side 1", "dots", points("validation", "nll", True)),
            ("at the stage's patch side", "marks", points("validation", "nll", False)),
            ("moving average, at patch side 1", "dashes", points("validation_ema", "nll", True)),
        ),
        panel("loss", "Training loss, nats per code", ("at the stage's patch side", "line", trained("loss"))),
        panel(
            "evaluation",
            "Frechet distance of samples",
            ("at patch side 1", "dots", points("evaluation", "frechet_distance", True)),
            ("at the stage's patch side", "marks", points("evaluation", "frechet_distance", False)),
            from_zero=True,
        ),
        panel("rate", "Learning rate", ("learning rate", "line", trained("learning_rate")), from_zero=True),
        panel("speed", "Images per second", ("images", "line", trained("images_per_second")), from_zero=True),
        panel("gradients", "Norm of the gradients", ("before clipping", "line", trained("grad_norm")), from_zero=True),
        panel("mfu", "MFU", ("of the GPU's peak", "line", trained("mfu")), from_zero=True),
    ]
    return [one for one in found if one.curves]


def plot_data(runs: Sequence[RunData], shown: Sequence[Panel]) -> dict[str, Any]:
    """Return all that the page's script draws, as JSON values: axes, runs and panels."""
    knots = [axis_knots(run) for run in runs]
    flops, seconds = (max(k[-1, column] for k in knots) for column in (2, 3))
    flop_unit = max((unit for unit in FLOP_UNITS if unit <= flops), default=min(FLOP_UNITS))
    second_unit, time_name = next((unit, name) for most, unit, name in TIME_UNITS if seconds < most)
    scale = np.array([1.0, 1.0, flop_unit, second_unit])
    return {
        "axes": ["step", "epoch", FLOP_UNITS[flop_unit], f"{time_name} of training"],
        "runs": [
            {
                "knots": [_rounded(row, 8) for row in k / scale],
                "stages": [[s.start_step, s.end_step, s.patch_side] for s in run.schedule.stages],
            }
            for run, k in zip(runs, knots, strict=True)
        ],
        "panels": [asdict(panel) for panel in shown],
    }


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
