"""The same evaluation for several guidance scales or checkpoints: a table and a plot."""

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from npp_ds.errors import UserError
from npp_ds.evaluation.evaluate import evaluate_images, rows_of, write_result
from npp_ds.evaluation.features import Extractor, Progress
from npp_ds.evaluation.images import open_images
from npp_ds.evaluation.reference import Reference
from npp_ds.files import write_atomic, write_json_atomic, write_text_atomic
from npp_ds.place import choose_device
from npp_ds.sampling.job import Sampling
from npp_ds.sampling.request import Request, companions, default_folder, image_count
from npp_ds.sampling.sampler import Options
from npp_ds.weights.checkpoint import folder_of, saved_steps, what_is_wrong
from npp_ds.weights.source import open_weights

CFG, CHECKPOINT, ALL = "cfg", "checkpoint", "all"
LABELS = {CFG: "scale of classifier-free guidance", CHECKPOINT: "checkpoint, step"}
TABLE_FILE, TEXT_FILE, PLOT_FILE = "sweep.json", "sweep.md", "sweep.png"
COLOR = "#4878a8"


@dataclass(frozen=True)
class Settings:
    """How samples are drawn at every value, as `npp sample` takes it; what is swept replaces its own entry."""

    per_class: int | None = None
    labels: str = "balanced"
    options: Options = field(default_factory=Options)
    step: int | None = None
    weights: str = "raw"
    dtype: str = "auto"
    batch_size: int = 64
    image_size: int | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Sweep:
    """What is varied, "cfg" or "checkpoint", its values (guidance scales or steps), and the sampling at each."""

    name: str
    values: tuple[float, ...]
    jobs: tuple[Sampling, ...]


def open_sweep(source: str | Path, text: str, settings: Settings) -> Sweep:
    """A sweep from `cfg=1.5,1.75`, `checkpoint=1000,2000` or `checkpoint=all`: every complete one of the run `source`.

    Samples lie where `npp sample` would put them: those that are there already are used. Raises UserError for anything
    that could not be sampled.
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
    return Sweep(name, values, tuple(_sampling(source, name, value, settings) for value in values))


def _complete_steps(source: str | Path) -> list[int]:
    checkpoints = Path(source) / "checkpoints"
    return [step for step in saved_steps(checkpoints) if what_is_wrong(folder_of(checkpoints, step)) is None]


def _sampling(source: str | Path, name: str, value: float, settings: Settings) -> Sampling:
    step = value if name == CHECKPOINT else settings.step
    weights = open_weights(source, step=step, kind=settings.weights)
    tokenizer, class_names = companions(weights, settings.tokenizer)
    device, dtype = choose_device("auto", 0), settings.dtype
    classes = range(weights.model.num_classes)
    request = Request(
        classes=classes,
        count=image_count(len(classes), settings.per_class, None),
        labels=settings.labels,
        image_size=settings.image_size,
        options=settings.options if name == CHECKPOINT else replace(settings.options, cfg_scale=value),
        dtype=("bf16" if device.startswith("cuda") else "fp32") if dtype == "auto" else dtype,
    )
    out = default_folder(weights, request)
    how = {"class_names": class_names, "device": device, "batch_size": settings.batch_size}
    return Sampling(weights, tokenizer, request, out, **how)


def run_sweep(
    sweep: Sweep,
    reference: Reference,
    extractor: Extractor,
    out: str | Path | None = None,
    progress: Callable[[str], AbstractContextManager[Progress]] = lambda what: nullcontext(lambda done, total: None),
) -> tuple[list[dict[str, Any]], Path]:
    """Samples what is missing, evaluates every value, and writes sweep.json, sweep.md and sweep.png into `out`, by
    default a folder beside the samples.

    Returns the results, each with its `value`, and the folder. The files are there, and grow, from the first value on;
    a sweep that was killed goes on with the samples it had.
    """
    folder = Path(out) if out else sweep.jobs[0].out.parent / f"sweep-{sweep.name}"
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for value, job in zip(sweep.values, sweep.jobs, strict=True):
        what = f"{sweep.name} {value:g}"
        with progress(f"sampling, {what}") as shown:
            job.run(progress=shown)
        if job.finish() is None:
            raise UserError(f"{job.out}: other processes are still drawing these samples; run again when they are done")
        with progress(f"evaluating, {what}") as shown:
            result = evaluate_images(open_images(job.out), reference, extractor, shown)
        write_result(result)
        results.append({"value": value, **result})
        write_json_atomic(folder / TABLE_FILE, {"sweep": sweep.name, "results": results})
        write_text_atomic(folder / TEXT_FILE, table(sweep.name, results))
        picture = plot(sweep.name, results)
        write_atomic(folder / PLOT_FILE, lambda file, picture=picture: file.write(picture))
    return results, folder


def table(name: str, results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each value, then what all of them rest on and every warning."""
    rows = [{metric: text for _, metric, text in rows_of(result)} for result in results]
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
    """PNG with a panel for each metric over the values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(key, title) for key, title, _ in rows_of(results[0]) if not key.startswith("reference")]
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis.plot([r["value"] for r in results], [r[key] for r in results], color=COLOR, marker="o", markersize=4)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(LABELS[name])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=1)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
