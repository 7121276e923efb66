"""Sample and evaluate several guidance scales or checkpoints, and write a table and a plot of the results."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from npp_ds.checkpoint.folders import find_problem, folder_of, saved_steps
from npp_ds.checkpoint.open import Weights, open_weights
from npp_ds.distributed.environment import ProcessInfo, choose_device, choose_dtype
from npp_ds.errors import UserError
from npp_ds.evaluation.evaluate import Reference, evaluate_images, rows_of, write_result
from npp_ds.evaluation.extractors import Extractor, Progress
from npp_ds.evaluation.images import open_images
from npp_ds.sampling.image_model import find_tokenizer
from npp_ds.sampling.job import Request, Sampling, default_folder, image_count
from npp_ds.sampling.logits_processing import Options
from npp_ds.tokenizer.vq import VQModel
from npp_ds.utils.files import check_writable, explain_os_errors, write_atomic, write_json_atomic, write_text_atomic

CFG, CHECKPOINT, ALL = "cfg", "checkpoint", "all"
_NUMBERS: dict[str, Callable[[str], float]] = {CFG: float, CHECKPOINT: int}
LABELS = {CFG: "scale of classifier-free guidance", CHECKPOINT: "checkpoint, step"}
TABLE_FILE, TEXT_FILE, PLOT_FILE = "sweep.json", "sweep.md", "sweep.png"
COLORS = ("#4878a8", "#d1773a", "#5a9a5a", "#8d6aa8")
POLL_SECONDS = 1.0
RESUME = "finished parts are kept, rerun the same command to resume"
ALONE = ProcessInfo()


@dataclass(frozen=True)
class Settings:
    """The options of `npp sample` for every value. The swept value replaces its own entry.

    `patch_side` replaces that of `options`; None means that of the stage in which the weights were last trained.
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
    """A guidance scale or a step, with its weights and its samples."""

    value: float
    weights: Weights
    request: Request


@dataclass(frozen=True)
class Sweep:
    """What varies ("cfg" or "checkpoint"), the points in order, and what all of them share."""

    name: str
    points: tuple[Point, ...]
    tokenizer: VQModel
    device: str
    batch_size: int

    @property
    def folder(self) -> Path:
        """The default folder of table and plot, beside the samples."""
        return default_folder(self.points[0].weights, self.points[0].request).parent / f"sweep-{self.name}"

    def sampling(self, point: Point) -> Sampling:
        """Return a new job, which loads a model of its own when it samples. Release one before creating the next."""
        weights, request, batch_size = point.weights, point.request, self.batch_size
        out = default_folder(weights, request)
        return Sampling(weights, self.tokenizer, request, out, device=self.device, batch_size=batch_size)


def open_sweep(source: str | Path, text: str, settings: Settings, local_rank: int = 0) -> Sweep:
    """Parse `cfg=1.5,1.75`, `checkpoint=1000,2000` or `checkpoint=all` (every complete one) into a sweep of `source`.

    All guidance scales use one checkpoint, which is looked up once. Samples are in the folders of `npp sample`, and
    existing ones are used. Raises UserError for anything that could not be sampled.
    """
    name, _, listed = text.partition("=")
    if (name, listed) == (CHECKPOINT, ALL):
        values: list[float] = sorted(_complete_steps(source))
    else:
        try:
            values = sorted({_NUMBERS[name](word) for word in listed.split(",")})
        except (ValueError, KeyError):
            raise UserError(
                f"sweep: found {text!r}, expected {CFG}=1.5,1.75,2.0 or {CHECKPOINT}=1000,2000 or {CHECKPOINT}={ALL}"
            ) from None
    if not values:
        raise UserError(f"{source}: found no checkpoint to sweep over; train first, or sweep over {CFG}")
    if name == CFG:
        weights = [open_weights(source, step=settings.step, variant=settings.weights)] * len(values)
    else:
        weights = [open_weights(source, step=int(step), variant=settings.weights) for step in values]
    tokenizer = find_tokenizer(weights[-1], settings.tokenizer)
    device = choose_device("auto", local_rank)
    points = (Point(v, w, _request(w, v, name, settings, device)) for v, w in zip(values, weights, strict=True))
    sweep = Sweep(name, tuple(points), tokenizer, device, settings.batch_size)
    for point in sweep.points:
        sweep.sampling(point)  # raises for what cannot be sampled
    return sweep


def _complete_steps(source: str | Path) -> list[int]:
    checkpoints = Path(source) / "checkpoints"
    return [step for step in saved_steps(checkpoints) if find_problem(folder_of(checkpoints, step)) is None]


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


def sample_share(sweep: Sweep, process: ProcessInfo) -> None:
    """Sample the unclaimed parts of all values; what every process of a sweep does except the first."""
    for point in sweep.points:
        job = sweep.sampling(point)
        with explain_os_errors(job.out, RESUME):
            job.run(process.rank, process.world_size)


def run_sweep(
    sweep: Sweep,
    reference: Reference,
    extractor: Extractor,
    out: str | Path | None = None,
    progress: Callable[[str], AbstractContextManager[Progress]] = lambda what: nullcontext(lambda done, total: None),
    process: ProcessInfo = ALONE,
) -> tuple[list[dict[str, Any]], Path]:
    """Sample what is missing, evaluate every value, and write sweep.json, sweep.md and sweep.png to `out`.

    `out` defaults to a folder beside the samples. The files are rewritten after each value. A sweep that was killed
    resumes with the samples it had. This function waits for samples of other processes. Returns the results, each with
    its `value`, and the folder.
    """
    folder = Path(out) if out else sweep.folder
    check_writable(folder / TABLE_FILE)
    results: list[dict[str, Any]] = []
    for point in sweep.points:
        what = f"{sweep.name} {point.value:g}"
        with progress(f"sampling, {what}") as shown:
            samples = _completed(sweep.sampling(point), process, shown)
        with progress(f"evaluating, {what}") as shown:
            result = evaluate_images(open_images(samples), reference, extractor, shown)
        write_result(result)
        results.append({"value": point.value, **result})
        with explain_os_errors(folder):
            write_json_atomic(folder / TABLE_FILE, {"sweep": sweep.name, "results": results})
            write_text_atomic(folder / TEXT_FILE, table(sweep.name, results))
            write_atomic(folder / PLOT_FILE, partial(plot, name=sweep.name, results=results))
    return results, folder


def _completed(job: Sampling, process: ProcessInfo, progress: Progress) -> Path:
    """Wait until the samples are finished, sampling the parts that other processes abandon. Return their folder."""
    with explain_os_errors(job.out, RESUME):
        job.run(process.rank, process.world_size, progress)
        while job.finish() is None:
            time.sleep(POLL_SECONDS)
            job.run(process.rank, process.world_size, progress)
    return job.out


def table(name: str, results: Sequence[dict[str, Any]]) -> str:
    """Return Markdown with a row for each value, then the common settings and every warning."""
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


def plot(file: IO[bytes], name: str, results: Sequence[dict[str, Any]]) -> None:
    """Write a PNG with a panel for each metric over the values, and a line for each patch side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(key, title) for key, title, _ in rows_of(results[0]) if not key.startswith("reference")]
    sides = sorted({result["samples"]["patch_side"] for result in results})
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, side in enumerate(sides):
            line = [r for r in results if r["samples"]["patch_side"] == side]
            axis.plot(
                [r["value"] for r in line],
                [r[key] for r in line],
                label=f"patch side {side}",
                color=COLORS[number % len(COLORS)],
                marker="osDv^"[number % 5],
                markersize=4,
            )
        if sides != [1]:
            axis.legend(frameon=False, fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(LABELS[name])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=1)
    figure.savefig(file, format="png", dpi=110)
