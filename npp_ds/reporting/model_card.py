"""The model card of an exported folder: what the weights are, what they cost, how they were evaluated, samples."""

import json

import yaml

from npp_ds import __version__
from npp_ds.checkpoint.open import Weights
from npp_ds.reporting.summary import STAGE_COLUMNS, read_run, result_rows, stage_rows, summarize
from npp_ds.sampling.folder import GRID_FILE, RECORD_FILE, newest_record
from npp_ds.utils.files import read_object

SECTIONS = ("model", "schedule", "optimizer", "precision", "seed")
"""What the card shows of a run's config: all that describes the training, and no path."""


def model_card(weights: Weights, folder: str, has_tokenizer: bool) -> dict[str, bytes]:
    """Return README.md for the folder of that name and, for a run with samples, samples.png: {file name: content}."""
    from jinja2 import Environment, PackageLoader

    run = read_run(weights.path) if weights.config else None
    newest = newest_record(weights.path / "samples", RECORD_FILE) if run else None
    grid = newest.parent / GRID_FILE if newest else None
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
        cfg_scale=(read_object(newest) if newest else {}).get("cfg_scale", 2 if weights.has_null_class else 1),
        summary=summary,
        columns=STAGE_COLUMNS,
        rows=stage_rows(summary) if summary else (),
        results=result_rows(summary) if summary else (),
        recipe=_recipe(weights),
    )
    return {"README.md": text.encode(), **pictures}


def _recipe(weights: Weights) -> str:
    if weights.config is None:
        return ""
    content = weights.config.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump({name: content[name] for name in SECTIONS}, sort_keys=False)
