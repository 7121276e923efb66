"""The same evaluation for several guidance scales or checkpoints: a table and a plot."""

import io
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from npp_ds.checkpoint.folders import folder_of, saved_steps, what_is_wrong
from npp_ds.checkpoint.open import open_weights
from npp_ds.checkpoint.weights import Weights
from npp_ds.distributed.environment import ProcessInfo, choose_device, choose_dtype
from npp_ds.errors import UserError
from npp_ds.evaluation.evaluate import evaluate_images, rows_of, write_result
from npp_ds.evaluation.features import Extractor, Progress
from npp_ds.evaluation.images import open_images
from npp_ds.evaluation.output_paths import try_target, writing
from npp_ds.evaluation.reference import Reference
from npp_ds.sampling.job import Sampling
from npp_ds.sampling.request import Request, companions, default_folder, image_count
from npp_ds.sampling.sampler import Options
from npp_ds.tokenizer.vq import VQModel
from npp_ds.utils.files import write_atomic, write_json_atomic, write_text_atomic

CFG, CHECKPOINT, ALL = "cfg", "checkpoint", "all"
LABELS = {CFG: "scale of classifier-free guidance", CHECKPOINT: "checkpoint, step"}
TABLE_FILE, TEXT_FILE, PLOT_FILE = "sweep.json", "sweep.md", "sweep.png"
COLORS = ("#4878a8", "#d1773a", "#5a9a5a", "#8d6aa8")
POLL_SECONDS = 1.0
KEPT = "the parts that are finished are kept, run the same command again"
ALONE = ProcessInfo()


@dataclass(frozen=True)
class Settings:
    """How samples are drawn at every value, as `npp sample` takes it; what is swept replaces its own entry.

    `patch_side`, instead of that of `options`; None: that of the stage the weights were last trained in.
    """

    per_class: int | None = None
    labels: str = "balanced"
    options: Options = field(default_factory=Options)
    step: int | None = None
    weights: str = "raw"
    dtype: str = "auto"
    batch_size: int = 64
    image_size: int | None = None
    tokenizer: str | None = None
    patch_side: int | None = None


class Point(NamedTuple):
    """A guidance scale or a step, and what is sampled there."""

    value: float
    weights: Weights
    request: Request


@dataclass(frozen=True)
class Sweep:
    """What is varied, "cfg" or "checkpoint", the points in order, and what the sampling of all of them shares."""

    name: str
    points: tuple[Point, ...]
    tokenizer: VQModel
    class_names: Sequence[str]
    device: str
    batch_size: int

    @property
    def folder(self) -> Path:
        """Where table and plot lie by default: beside the samples."""
        return default_folder(self.points[0].weights, self.points[0].request).parent / f"sweep-{self.name}"

    def sampling(self, point: Point) -> Sampling:
        """A new one, which loads a model of its own when it draws: let go of one before taking the next."""
        how = {"class_names": self.class_names, "device": self.device, "batch_size": self.batch_size}
        out = default_folder(point.weights, point.request)
        return Sampling(point.weights, self.tokenizer, point.request, out, **how)


def open_sweep(source: str | Path, text: str, settings: Settings, local_rank: int = 0) -> Sweep:
    """A sweep from `cfg=1.5,1.75`, `checkpoint=1000,2000` or `checkpoint=all`: every complete one of the run `source`.

    All guidance scales are of one checkpoint, found once. Samples lie where `npp sample` would put them: those that are
    there already are used. Raises UserError for anything that could not be sampled.
    """
    name, _, listed = text.partition("=")
    number = {CFG: float, CHECKPOINT: int}.get(name)
    try:
        words = _complete_steps(source) if (name, listed) == (CHECKPOINT, ALL) else listed.split(",")
        values = tuple(sorted(set(map(number, words))))
    except (ValueError, TypeError):
        raise UserError(
            f"sweep: found {text!r}, expected {CFG}=1.5,1.75,2.0 or {CHECKPOINT}=1000,2000 or {CHECKPOINT}={ALL}"
        ) from None
    if not values:
        raise UserError(f"{source}: found no checkpoint to sweep over; train first, or sweep over {CFG}")
    if name == CFG:
        weights = [open_weights(source, step=settings.step, kind=settings.weights)] * len(values)
    else:
        weights = [open_weights(source, step=step, kind=settings.weights) for step in values]
    tokenizer, class_names = companions(weights[-1], settings.tokenizer)
    device = choose_device("auto", local_rank)
    points = (Point(v, w, _request(w, v, name, settings, device)) for v, w in zip(values, weights, strict=True))
    sweep = Sweep(name, tuple(points), tokenizer, class_names, device, settings.batch_size)
    for point in sweep.points:
        sweep.sampling(point)  # refuses what cannot be drawn
    return sweep


def _complete_steps(source: str | Path) -> list[int]:
    checkpoints = Path(source) / "checkpoints"
    return [step for step in saved_steps(checkpoints) if what_is_wrong(folder_of(checkpoints, step)) is None]


def _request(weights: Weights, value: float, name: str, settings: Settings, device: str) -> Request:
    side = settings.patch_side or weights.patch_side or 1
    options = replace(settings.options, patch_side=side)
    classes = range(weights.model.num_classes)
    return Request(
        classes=classes,
        count=image_count(len(classes), settings.per_class, None),
        labels=settings.labels,
        image_size=settings.image_size,
        options=replace(options, cfg_scale=value) if name == CFG else options,
        dtype=choose_dtype(settings.dtype, device),
    )


def draw_share(sweep: Sweep, place: ProcessInfo) -> None:
    """Draws what nobody else does of the samples of all values: the part in a sweep of all processes but the first."""
    for point in sweep.points:
        job = sweep.sampling(point)
        with writing(job.out, KEPT):
            job.run(place.rank, place.world_size)


def run_sweep(
    sweep: Sweep,
    reference: Reference,
    extractor: Extractor,
    out: str | Path | None = None,
    progress: Callable[[str], AbstractContextManager[Progress]] = lambda what: nullcontext(lambda done, total: None),
    place: ProcessInfo = ALONE,
) -> tuple[list[dict[str, Any]], Path]:
    """Samples what is missing, evaluates every value, and writes sweep.json, sweep.md and sweep.png into `out`, by
    default a folder beside the samples. Waits for samples that other processes draw.

    Returns the results, each with its `value`, and the folder. The files are there, and grow, from the first value on;
    a sweep that was killed goes on with the samples it had.
    """
    folder = Path(out) if out else sweep.folder
    try_target(folder / TABLE_FILE)
    results: list[dict[str, Any]] = []
    for point in sweep.points:
        what = f"{sweep.name} {point.value:g}"
        with progress(f"sampling, {what}") as shown:
            samples = _completed(sweep.sampling(point), place, shown)
        with progress(f"evaluating, {what}") as shown:
            result = evaluate_images(open_images(samples), reference, extractor, shown)
        write_result(result)
        results.append({"value": point.value, **result})
        picture = plot(sweep.name, results)
        with writing(folder):
            write_json_atomic(folder / TABLE_FILE, {"sweep": sweep.name, "results": results})
            write_text_atomic(folder / TEXT_FILE, table(sweep.name, results))
            write_atomic(folder / PLOT_FILE, lambda file, picture=picture: file.write(picture))
    return results, folder


def _completed(job: Sampling, place: ProcessInfo, progress: Progress) -> Path:
    """The folder of the samples, once they are finished. Parts that other processes let go of are drawn here."""
    with writing(job.out, KEPT):
        job.run(place.rank, place.world_size, progress)
        while job.finish() is None:
            time.sleep(POLL_SECONDS)
            job.run(place.rank, place.world_size, progress)
    return job.out


def table(name: str, results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each value, then what all of them rest on and every warning."""
    rows = [{metric: text for _, metric, text in rows_of(result)} for result in results]
    sides = [result["samples"]["patch_side"] for result in results]
    if set(sides) != {1}:
        rows = [{"patch side": str(side), **row} for side, row in zip(sides, rows, strict=True)]
    columns = list(rows[0])
    lines = [f"| {' | '.join([name, *columns])} |", f"|{'---|' * (len(columns) + 1)}"]
    for result, row in zip(results, rows, strict=True):
        lines.append(f"| {' | '.join([format(result['value'], 'g'), *(row.get(c, '') for c in columns)])} |")
    first = results[0]
    against = f"{first['reference']['path']}, features of {first['extractor']}"
    lines += ["", f"{first['num_images']:,} samples each, against {against}."]
    warnings = dict.fromkeys(text for result in results for text in result["warnings"])
    return "\n".join([*lines, *(f"\nWarning: {text}." for text in warnings)]) + "\n"


def plot(name: str, results: Sequence[dict[str, Any]]) -> bytes:
    """PNG with a panel for each metric over the values, and in it a line for each patch side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(key, title) for key, title, _ in rows_of(results[0]) if not key.startswith("reference")]
    sides = sorted({result["samples"]["patch_side"] for result in results})
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, side in enumerate(sides):
            there = [r for r in results if r["samples"]["patch_side"] == side]
            style = {"color": COLORS[number % len(COLORS)], "marker": "osDv^"[number % 5], "markersize": 4}
            axis.plot([r["value"] for r in there], [r[key] for r in there], label=f"patch side {side}", **style)
        if sides != [1]:
            axis.legend(frameon=False, fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(LABELS[name])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=1)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
