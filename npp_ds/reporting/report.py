"""Documents about runs: the report, one HTML file with everything in it, and the model card of an exported folder."""

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup, escape
from PIL import Image

from npp_ds import __version__
from npp_ds.errors import UserError
from npp_ds.reporting.plot import panels, plot_data, plot_run
from npp_ds.reporting.summary import (
    LIKELIHOOD_PLOT,
    PAGE_FILE,
    PLOT_FILE,
    STAGE_COLUMNS,
    RunData,
    RunSummary,
    read_run,
    read_run_of,
    result_rows,
    stage_rows,
    summarize,
)
from npp_ds.sampling.folder import GRID_FILE, RECORD_FILE, tiled
from npp_ds.training.metrics import Event, events_named
from npp_ds.utils.files import check_writable, explain_os_errors, read_object, write_atomic, write_text_atomic
from npp_ds.utils.format import counted, format_duration

if TYPE_CHECKING:
    from npp_ds.checkpoint.open import Weights

COMPARISON_FILE = "comparison.html"
SHOWN_SIDES, SHOWN_IMAGES, SHOWN_PER_ROW = (8, 4, 2, 1), 4, 2
MOST_BYTES, MOST_WIDTH = 300_000, 1024
"""Larger pictures are made narrower and stored as JPEG, so that the page stays a few megabytes."""

GLOSSARY = {
    "patch side": "The side p of the square patches into which the map of codes is cut. A patch of p x p codes is one "
    "position of the sequence: the model sees the mean of their embeddings and predicts all of them. Side 1 is plain "
    "next-token prediction, which is what samples are drawn with.",
    "stage": "A part of the training with one patch side. Stages go from coarse to fine and end at side 1.",
    "code": "The number of a vector in the tokenizer's codebook. The tokenizer turns an image into a square map of "
    "codes and decodes such a map to an image.",
    "nats per code": "The mean negative log-likelihood of a code given all before it, with the natural logarithm. "
    "Lower is better; a uniform guess among V codes has ln V.",
    "validation": "The likelihood of held-out images, without dropout.",
    "moving average": "Weights averaged over the steps of training (EMA).",
    "Frechet distance": "The distance between two sets of images, each described by mean and covariance of a network's "
    "features. With Inception's features and 50,000 samples it is the FID; with fewer samples it is higher. Lower is "
    "better.",
    "CFG": "Classifier-free guidance: the scale by which sampling exaggerates what the class changes in the "
    "prediction. 1 is no guidance.",
    "next-token training": "Training on the same images at patch side 1 throughout.",
    "FLOPs": "Floating-point operations of forward and backward pass: 6 per matrix parameter and position, plus causal "
    "attention. TFLOPs, PFLOPs and EFLOPs are 10^12, 10^15 and 10^18.",
    "MFU": "Model FLOPs utilization: the model's FLOPs per second over the peak of the GPU.",
    "positions": "Elements of the sequences that the model computes: one per patch.",
    "epoch": "One pass over the training images.",
    "tokenizer": "The network (VQ model) that turns images into codes and codes into images. It is not trained here.",
}

_TERMS = re.compile(
    r"\b(" + "|".join(sorted(map(re.escape, GLOSSARY), key=len, reverse=True)) + r")(?!\w)", re.IGNORECASE
)
_KEYS = {term.lower(): term for term in GLOSSARY}

Rows = list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Picture:
    """A picture in the page: its address (`data:`), caption and text for those who cannot see it."""

    source: str
    caption: str
    description: str


def picture(png: bytes | Path, caption: str, description: str) -> Picture:
    """Embed a PNG, or a smaller JPEG of it."""
    content = png.read_bytes() if isinstance(png, Path) else png
    kind = "png"
    if len(content) > MOST_BYTES:
        kind, smaller = "jpeg", io.BytesIO()
        with Image.open(io.BytesIO(content)) as image:
            height = round(image.height * min(1.0, MOST_WIDTH / image.width))
            size = (min(MOST_WIDTH, image.width), max(1, height))
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(smaller, "JPEG", quality=88)
        content = smaller.getvalue()
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", caption, description)


def about_rows(run: RunData) -> list[tuple[str, str]]:
    """Return (name, value) of what a run is: date, commit, hardware, software, data, model, training."""
    config, environment, manifest = run.config, run.environment, run.manifest
    model, versions = config.model, environment.get("versions") or {}
    sides = ", ".join(str(s.patch_side) for s in config.stage_table())
    shape = model.shape()
    rows = [("run", str(run.folder))]
    if started := environment.get("started_at"):
        rows.append(("last start", datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M UTC")))
    if commit := environment.get("git_commit"):
        changed = ", with changed files" if commit.endswith("+") else ""
        rows.append(("commit", commit.rstrip("+") + changed))
    if "device" in environment:
        cores = f", {environment['cpu_cores']} CPU cores" if environment.get("cpu_cores") else ""
        processes, system = environment.get("world_size", 1), environment.get("platform", "")
        rows.append(("hardware", f"{processes} x {environment['device']}{cores}; {system}"))
    software = {"npp_ds": environment.get("npp_ds"), "Python": environment.get("python"), **versions}
    if known := ", ".join(f"{name} {version}" for name, version in software.items() if version):
        rows.append(("software", known))
    size = f": {manifest.num_samples:,} images, crops: {len(manifest.crops.names)} of each" if manifest else ""
    rows.append(("data", config.data.train + size))
    if config.data.val:
        rows.append(("held-out data", config.data.val))
    if manifest:
        t = manifest.tokenizer
        rows.append(("tokenizer", f"{t.name}, {t.downsample} pixels per code, SHA-256 {t.sha256[:12]}.."))
    rows += [
        (
            "model",
            f"{model.parameters() / 1e6:,.1f}M parameters: {shape['n_layers']} layers, width {shape['dim']}, "
            f"{shape['n_heads']} heads; {model.grid_size} x {model.grid_size} codes out of {model.vocab_size:,}, "
            f"{model.num_classes:,} classes",
        ),
        ("patch sides", sides),
        ("images per step", ", ".join(dict.fromkeys(f"{s.batch_size:,}" for s in run.schedule.stages))),
        (
            "peak learning rates",
            ", ".join(dict.fromkeys(f"{s.peak_learning_rate:.3g}" for s in run.schedule.stages)),
        ),
        ("precision, seed", f"{config.precision}, {config.seed}"),
    ]
    return rows


def tiles(summary: RunSummary) -> list[tuple[str, str]]:
    """Return (value, meaning) of the few figures that one looks at first."""
    found = [
        (summary.validation_nll, "{:.3f}", "nats per code in validation at patch side 1"),
        (summary.evaluation.get("frechet_distance", summary.last_distance), "{:.4g}", "Frechet distance of samples"),
        (summary.flop_cost, "{:.1%}", "of the FLOPs of next-token training"),
        (summary.time_cost, "{:.1%}", "of its time, by the measured rates"),
    ]
    known = [(form.format(value), meaning) for value, form, meaning in found if value is not None]
    return [*known, (format_duration(summary.total("seconds")), "of training")]


def side_by_side(tables: Sequence[Sequence[tuple[str, str]]]) -> Rows:
    """Return (name, value of each table) of all names, in the order in which they first appear."""
    names = dict.fromkeys(name for table in tables for name, _ in table)
    found = [dict(table) for table in tables]
    return [(name, [values.get(name, "-") for values in found]) for name in names]


def _samples(run: RunData) -> list[Picture]:
    if run.samples is None or not (grid := run.samples / GRID_FILE).is_file():
        return []
    return [picture(grid, f"{run.samples.name}: one row per class", "samples, one row per class")]


def _samples_while_training(run: RunData) -> list[Picture]:
    return [
        picture(path, f"step {event['step']:,}, patch side {event['patch_side']}", "samples of the same seeds")
        for event, path in run.pictures_while_training()
    ]


def _likelihood(run: RunData) -> list[Picture]:
    path = run.folder / LIKELIHOOD_PLOT
    return [picture(path, "", "likelihood and accuracy by position in the image")] if path.is_file() else []


def _evaluation_rows(run: RunData) -> list[tuple[str, ...]]:
    return [
        (
            f"{e['step']:,}",
            str(e["patch_side"]),
            f"{e['frechet_distance']:.4g}",
            f"{e['images']:,}",
            f"{e['cfg_scale']:g}",
            e["weights"],
        )
        for e in events_named(run.events, "evaluation")
    ]


EVALUATION_COLUMNS = ("step", "patch side", "Frechet distance", "images", "CFG", "weights")


def caveats(runs: Sequence[RunData]) -> list[str]:
    """Return why figures of these runs are not comparable, as sentences."""
    kinds: list[tuple[str, Callable[[RunData], Any]]] = [
        (
            "The runs are validated on different images: do not compare their likelihoods.",
            lambda r: (r.config.data.val, r.config.validation.limit) if r.config.data.val else None,
        ),
        (
            "The runs use different tokenizers: likelihoods of their codes are not comparable.",
            lambda r: r.manifest.tokenizer.sha256 if r.manifest else None,
        ),
        (
            "The runs are evaluated with different settings while they train: do not compare these Frechet distances.",
            lambda r: tuple(dict.fromkeys(map(_settings, events_named(r.events, "evaluation")))) or None,
        ),
        (
            "The samples of the runs are evaluated with different settings: do not compare their Frechet distances.",
            lambda r: _evaluated(r.evaluation) if r.evaluation else None,
        ),
    ]
    return [text for text, of in kinds if len({of(run) for run in runs} - {None}) > 1]


def _settings(event: Event) -> tuple[Any, ...]:
    return tuple(event.get(name) for name in ("images", "cfg_scale", "weights"))


def _evaluated(evaluation: dict[str, Any]) -> str:
    """Return what must be equal where two evaluations are compared."""
    names = ("cfg_scale", "temperature", "top_k", "top_p", "cfg_interval", "labels", "patch_side", "weights")
    samples, reference = evaluation.get("samples", {}), evaluation.get("reference", {})
    of_samples = [samples.get(name) for name in names]
    return json.dumps([evaluation.get("num_images"), evaluation.get("extractor"), reference.get("sha256"), of_samples])


def page(
    runs: Sequence[RunData],
    summaries: Sequence[RunSummary],
    patches: Sequence[Picture] = (),
    without_patches: str = "",
    next_steps: Sequence[str] = (),
) -> str:
    """Return the report of one or several runs as an HTML page that needs no other file.

    `patches` show the grouping of codes into patches on images of the data; `without_patches` is why there are none.
    """
    from jinja2 import Environment, PackageLoader

    names = [summary.name for summary in summaries]
    shown = panels(runs, names)
    templates = Environment(
        loader=PackageLoader("npp_ds.reporting", "."), autoescape=True, keep_trailing_newline=True, trim_blocks=True
    )
    templates.filters |= {"terms": with_terms, "anchor": anchor}
    return templates.get_template("report.html.j2").render(
        names=names,
        runs=[
            {
                "name": name,
                "summary": summary,
                "stages": stage_rows(summary),
                "command": run.command(),
                "config": run.config.to_yaml(),
                "evaluations": _evaluation_rows(run),
                "samples": _samples(run),
                "samples_while_training": _samples_while_training(run),
                "likelihood": _likelihood(run),
                "coarse": any(stage.patch_side > 1 for stage in run.schedule.stages),
            }
            for name, run, summary in zip(names, runs, summaries, strict=True)
        ],
        tiles=tiles(summaries[0]) if len(runs) == 1 else [],
        about=side_by_side([about_rows(run) for run in runs]),
        results=side_by_side([result_rows(summary) for summary in summaries]),
        caveats=caveats(runs),
        panels=shown,
        plot_data=plot_data(runs, shown),
        patches=patches,
        without_patches=without_patches,
        stage_columns=STAGE_COLUMNS,
        evaluation_columns=EVALUATION_COLUMNS,
        next_steps=next_steps,
        glossary=GLOSSARY,
    )


def anchor(term: str) -> str:
    """Return the id of a term's entry in the glossary."""
    return "term-" + term.lower().replace(" ", "-")


def with_terms(text: str) -> Markup:
    """Return a text as HTML in which the first use of each term links to its entry and shows it as hover text."""
    seen: set[str] = set()

    def link(match: re.Match[str]) -> str:
        term = _KEYS[match[0].lower()]
        if term in seen:
            return match[0]
        seen.add(term)
        explanation = escape(GLOSSARY[term])
        return (
            f'<a class="term" href="#{anchor(term)}" aria-describedby="{anchor(term)}">{match[0]}'
            f'<span class="tip" aria-hidden="true">{explanation}</span></a>'
        )

    return Markup(_TERMS.sub(link, str(escape(text))))


def report_runs(
    run_dirs: Sequence[str | Path],
    *,
    out: Path | None = None,
    next_steps: Sequence[str] = (),
) -> list[RunSummary]:
    """Write the page of one run, or one page that compares several; return the figures for the closing tables.

    By default the page of one run is report.html in its folder, which gets training.png as well, and that of several
    is comparison.html in the folder that holds the first run. Only `out` is written if it is given. Runs may be
    unfinished. Raises UserError if a folder is not a run or has no training line yet, or the page cannot be written.
    """
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    for run in runs:
        if not run.lines:
            raise UserError(
                f"{run.folder}/metrics.jsonl: not found, or no training line yet; wait until the run has logged its "
                "first step"
            )
    first = runs[0].folder
    path = check_writable(out or (first / PAGE_FILE if len(runs) == 1 else first.parent / COMPARISON_FILE))
    patches, reason = patch_pictures(runs)
    with explain_os_errors(path):
        if path == first / PAGE_FILE:
            plot = plot_run(runs[0])
            write_atomic(first / PLOT_FILE, lambda file: file.write(plot))
        names = [run.config.name for run in runs]
        if len(set(names)) < len(names):
            names = [str(run.folder) for run in runs]
        summaries = [
            summarize(run, name, path, next_steps if run is runs[-1] else ())
            for run, name in zip(runs, names, strict=True)
        ]
        write_text_atomic(path, page(runs, summaries, patches, reason, next_steps))
    return summaries


def patch_pictures(runs: Sequence[RunData]) -> tuple[list[Picture], str]:
    """Return pictures of images of the data whose codes are averaged in patches, one per patch side, coarse to fine.

    They are of the first run whose data and tokenizer are on this machine. Needs torch; the second value is why there
    are none.
    """
    reasons = []
    for run in runs:
        try:
            return _patch_pictures(run), ""
        except (UserError, ImportError, OSError) as error:
            reasons.append(str(error))
    return [], reasons[0]


def _patch_pictures(run: RunData) -> list[Picture]:
    from npp_ds.tokenizer.contents import decode_patch_means, evenly_spaced_codes
    from npp_ds.tokenizer.loading import tokenizer_of

    data = run.config.data
    manifest, codes = evenly_spaced_codes(data.val or data.train, data.cache_dir, SHOWN_IMAGES)
    tokenizer = tokenizer_of(manifest.tokenizer, data.tokenizer)
    pictures = []
    for side in (side for side in SHOWN_SIDES if manifest.grid_size % side == 0):
        png, positions = io.BytesIO(), (manifest.grid_size // side) ** 2
        tiled(decode_patch_means(tokenizer, codes, side), SHOWN_PER_ROW).save(png, "PNG")
        codes_each = f"of {side * side} codes each" if side > 1 else "of one code each"
        what = f"patch side {side}: {counted(positions, 'position')} {codes_each}"
        pictures.append(picture(png.getvalue(), what, f"images of the data, {what}"))
    return pictures


CARD_SECTIONS = ("model", "schedule", "optimizer", "precision", "seed")
"""What the card shows of a run's config: all that describes the training, and no path."""


def model_card(weights: "Weights", folder: str, has_tokenizer: bool) -> dict[str, bytes]:
    """Return the model card of an exported folder: what these weights are, what they cost, how they were evaluated.

    The result is {file name: content}: README.md for the folder of that name, samples.png for a run with samples.
    """
    from jinja2 import Environment, PackageLoader

    run = read_run_of(weights)
    samples = run.samples if run else None
    grid = samples / GRID_FILE if samples else None
    pictures = {"samples.png": grid.read_bytes()} if grid and grid.is_file() else {}
    summary = summarize(run, weights.name) if run and run.lines else None
    templates = Environment(loader=PackageLoader("npp_ds.reporting", "."), keep_trailing_newline=True)
    text = templates.get_template("model_card.md.j2").render(
        weights=weights,
        version=__version__,
        folder=folder,
        has_tokenizer=has_tokenizer,
        has_samples=bool(pictures),
        classes=json.dumps(list(weights.class_names[:2]) or [0, 1], ensure_ascii=False),
        cfg_scale=(read_object(samples / RECORD_FILE) if samples else {}).get(
            "cfg_scale", 2 if weights.has_null_class else 1
        ),
        summary=summary,
        columns=STAGE_COLUMNS,
        rows=stage_rows(summary) if summary else (),
        results=result_rows(summary) if summary else (),
        recipe=_recipe(weights),
    )
    return {"README.md": text.encode(), **pictures}


def _recipe(weights: "Weights") -> str:
    if weights.config is None:
        return ""
    content = weights.config.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump({name: content[name] for name in CARD_SECTIONS}, sort_keys=False)
