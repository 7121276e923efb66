"""Plots of a run, and of a model's likelihood by position."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npp_ds.config.schedule import Stage
from npp_ds.training.metrics import Event, events_named
from npp_ds.utils.files import write_atomic, write_json_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SHADES = ("#e3edf7", "#fdf0dd", "#e6f3e6", "#f3e6f0", "#eeeeee")
TIME_UNITS = ((180, 1, "seconds"), (7200, 60, "minutes"), (float("inf"), 3600, "hours"))
TRAIN, VALIDATION, OWN_SIDE, RATE = "#4878a8", "#c44e52", "#dd8452", "#55834f"


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and its finite neighbours at most `reach` positions away, fewer at the ends."""
    known = np.isfinite(values)
    sums, counts = (np.cumsum([0.0, *of_each]) for of_each in (np.where(known, values, 0.0), known))
    low, high = (np.clip(np.arange(len(values)) + by, 0, len(values)) for by in (-reach, reach + 1))
    return ((sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)).tolist()


def _shade(axis: "Axes", edges: Sequence[tuple[float, float, int]]) -> None:
    """Shade the span of each (start, end, patch side) and write the side above, if there is space."""
    first, last = edges[0][0], edges[-1][1]
    above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (0, 4), "textcoords": "offset points"}
    for i, (start, end, side) in enumerate(edges):
        axis.axvspan(start, end, color=SHADES[i % len(SHADES)], zorder=0, linewidth=0)
        if end - start > 0.06 * (last - first):
            axis.annotate(f"{side}x{side}", ((start + end) / 2, 1), ha="center", fontsize=9, color="#555555", **above)
    axis.set_xlim(first, last)


def _draw_losses(axis: "Axes", events: list[Event], stages: Sequence[Stage]) -> None:
    axis.plot([], [], color=TRAIN, label="training, at the stage's side")
    for stage in stages:
        lines = events_named(events, "train", stage.index)
        steps, losses = [e["step"] for e in lines], [e["loss"] for e in lines]
        axis.plot(steps, losses, color=TRAIN, alpha=0.3, linewidth=0.8)
        axis.plot(steps, smooth(losses, len(losses) // 40), color=TRAIN, linewidth=1.5)
    validations = events_named(events, "validation")
    own = [e for e in validations if e["patch_side"] != 1]
    plain = [e for e in validations if e["patch_side"] == 1]
    styles: tuple[tuple[list[Event], dict[str, Any]], ...] = (
        (own, {"color": OWN_SIDE, "marker": "s", "linewidth": 0, "label": "validation, at the stage's side"}),
        (plain, {"color": VALIDATION, "marker": "o", "linewidth": 1.2, "label": "validation, at side 1"}),
    )
    for points, style in styles:
        if points:
            axis.plot(
                [e["step"] for e in points], [e["nll"] for e in points], markersize=4, clip_on=False, zorder=3, **style
            )
    axis.legend(frameon=False, fontsize=9)


def _seconds_at(events: list[Event], step: int) -> float:
    return max((e["elapsed_seconds"] for e in events_named(events, "train") if e["step"] <= step), default=0.0)


def _draw_likelihood(axis: "Axes", events: list[Event], stages: Sequence[Stage]) -> None:
    total = _seconds_at(events, stages[-1].end_step) or 1.0
    unit, name = next((u, n) for most, u, n in TIME_UNITS if total < most)
    points = [e for e in events_named(events, "validation") if e["patch_side"] == 1]
    times, nll = [_seconds_at(events, e["step"]) / unit for e in points], [e["nll"] for e in points]
    if points:
        axis.plot(times, nll, color=VALIDATION, marker="o", markersize=4, linewidth=1.2, clip_on=False, zorder=3)
    else:
        axis.text(0.5, 0.5, "none so far", transform=axis.transAxes, ha="center", color="#555555")
    axis.set_xlabel(f"{name} of training")
    ends = [_seconds_at(events, s.end_step) / unit for s in stages]
    spans = zip([0.0, *ends], ends, stages, strict=False)
    _shade(axis, [(start, end, s.patch_side) for start, end, s in spans if end > start] or [(0, 1, 1)])


def _draw_distances(axis: "Axes", events: list[Event]) -> None:
    """Plot the distances of samples per patch side: those of different sides are not comparable."""
    points = events_named(events, "evaluation")
    for number, side in enumerate(sorted({e["patch_side"] for e in points})):
        own = [e for e in points if e["patch_side"] == side]
        color, marker = (VALIDATION, "o") if side == 1 else (OWN_SIDE, "sDv^"[number % 4])
        steps, distances = [e["step"] for e in own], [e["frechet_distance"] for e in own]
        axis.plot(
            steps, distances, color=color, marker=marker, markersize=4, linewidth=1.2, clip_on=False, zorder=3,
            label=f"side {side}",
        )  # fmt: skip
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=9)


def plot_run(events: list[Event], stages: Sequence[Stage], title: str) -> bytes:
    """Return a PNG of a run from its events and its stage table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evaluations = events_named(events, "evaluation")
    figure = Figure(figsize=(11, 10 if evaluations else 7), layout="constrained")
    FigureCanvasAgg(figure)
    rows: list[Any] = [["losses", "likelihood"], ["learning rate", "throughput"], ["distance", "distance"]]
    rows = rows if evaluations else rows[:2]
    panels = list(figure.subplot_mosaic(rows, height_ratios=[1.6, 1, 1][: len(rows)]).values())
    losses, likelihood, learning_rate, throughput, *distance = panels
    lines = events_named(events, "train")
    steps = [e["step"] for e in lines]
    _draw_losses(losses, events, stages)
    learning_rate.plot(steps, [e["learning_rate"] for e in lines], color=TRAIN, linewidth=1.4)
    throughput.plot(steps, [e["images_per_second"] for e in lines], color=RATE, linewidth=1.2)
    for axis in distance:
        _draw_distances(axis, events)
    for axis in (losses, learning_rate, throughput, *distance):
        _shade(axis, [(s.start_step, s.end_step, s.patch_side) for s in stages])
        axis.set_xlabel("step")
    _draw_likelihood(likelihood, events, stages)
    for axis in (learning_rate, throughput):
        axis.set_ylim(bottom=0)
    nll = [e["nll"] for e in events_named(events, "validation") if e["patch_side"] == 1]
    last = f" (last {nll[-1]:.3f})" if nll else ""
    titles = ["Loss, nats per code", f"Validation at side 1, nats per code{last}", "Learning rate", "Images per second"]
    titles += [f"Frechet distance of {e['images']:,} samples, CFG {e['cfg_scale']:g}" for e in evaluations[-1:]]
    for axis, text in zip(panels, titles, strict=True):
        axis.set_title(text, fontsize=11, pad=18)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="white", linewidth=1)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


MAPS = (
    ("nats_per_code", "nats per code", "magma"),
    ("top1_accuracy", "top-1 accuracy", "viridis"),
    ("top5_accuracy", "top-5 accuracy", "viridis"),
)
ANNOTATED = 8  # the most cells in a row that have space for their number


def likelihood_picture(result: dict[str, Any]) -> bytes:
    """Return a PNG with three maps of the image's patches, from the result of `evaluation.likelihood.likelihood_of`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
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
    figure.suptitle(
        f"{weights['name']}{step} ({weights['kind']}), {result['images']:,} held-out images at patch side "
        f"{result['patch_side']}: {result['bits_per_image']:,.0f} bits per image",
        fontsize=12,
        fontweight="bold",
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def write_likelihood(path: Path, result: dict[str, Any]) -> Path:
    """Write the figures to `path` (JSON) and the picture beside it; return the picture's path."""
    picture = likelihood_picture(result)
    png = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(png, lambda file: file.write(picture))
    write_json_atomic(path, result)
    return png
