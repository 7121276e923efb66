"""Make the report of a run from the files in its folder: a plot, an HTML page and a table."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npp_ds.config.schedule import Schedule
from npp_ds.data.store import available_manifest
from npp_ds.errors import UserError
from npp_ds.reporting.plot import plot_run
from npp_ds.reporting.summary import STAGE_COLUMNS, RunSummary, print_summary, result_rows, stage_rows, summarize
from npp_ds.sampling.folder import GRID_FILE, RECORD_FILE, newest_record
from npp_ds.training.metrics import Event, events_named, read_events, stages_begun
from npp_ds.utils.files import write_atomic, write_text_atomic

if TYPE_CHECKING:
    from npp_ds.config.schema import RunConfig

PLOT_FILE, PAGE_FILE, LIKELIHOOD_PLOT = "training.png", "report.html", "likelihood.png"


def page(summary: RunSummary, pictures: Sequence[tuple[str, str, bytes | None]], config_text: str = "") -> str:
    """Return the report as one HTML page that needs no other file.

    `pictures` are (title, description, PNG); those that are None are left out.
    """
    from jinja2 import Environment, PackageLoader

    templates = Environment(loader=PackageLoader("npp_ds.reporting", "."), autoescape=True, keep_trailing_newline=True)
    templates.filters["base64"] = lambda png: base64.b64encode(png).decode()
    return templates.get_template("report.html.j2").render(
        summary=summary,
        stage_columns=STAGE_COLUMNS,
        stage_rows=stage_rows(summary),
        result_rows=result_rows(summary),
        pictures=pictures,
        config_text=config_text,
    )


def newest_evaluation(run_dir: Path) -> tuple[dict[str, Any], Path] | None:
    """Return the content of the newest <run_dir>/samples/*/evaluation.json and its folder, or None."""
    found = newest_record(run_dir / "samples", "evaluation.json")
    return (json.loads(found.read_text()), found.parent) if found else None


def _read(path: Path | None) -> bytes | None:
    return path.read_bytes() if path and path.is_file() else None


def _schedule(config: "RunConfig", events: list[Event]) -> tuple[Schedule, dict[str, float]]:
    """Return the stage table and its costs.

    If the training shards are not available, the table has the stages that have begun, and there are costs only if
    these are all stages.
    """

    manifest = available_manifest(config.data.train, config.data.cache_dir)
    schedule = config.build_schedule(manifest.num_samples) if manifest else Schedule(tuple(stages_begun(events)))
    if not (manifest or events_named(events, "end")):
        return schedule, {}
    flop_cost = schedule.flop_cost(config.model.grid_size, config.model.training_flops)
    return schedule, {"token_cost": schedule.token_cost(), "flop_cost": flop_cost}


def _files(run_dir: Path, samples: Path | None) -> list[tuple[str, str]]:
    candidates = [
        ("report", run_dir / PAGE_FILE),
        ("plot of the run", run_dir / PLOT_FILE),
        ("samples to look at", samples / "grid.png" if samples else None),
        ("samples for metrics", samples / "samples.npz" if samples else None),
        ("evaluation", samples / "evaluation.json" if samples else None),
        ("likelihood by position", run_dir / "likelihood.json"),
        ("checkpoints", run_dir / "checkpoints"),
        ("metrics of every step", run_dir / "metrics.jsonl"),
        ("settings", run_dir / "config.yaml"),
    ]
    always = (PAGE_FILE, PLOT_FILE)
    return [(what, str(path)) for what, path in candidates if path and (path.name in always or path.exists())]


def report_run(
    run_dir: str | Path,
    *,
    evaluation: dict[str, Any] | None = None,
    next_steps: Sequence[str] = (),
    show: bool = True,
) -> RunSummary:
    """Write <run_dir>/training.png and report.html, print the closing table if `show`, and return the figures.

    `evaluation` defaults to the newest evaluation.json under <run_dir>/samples. The run may be unfinished. Raises
    UserError if the folder is not a run or has no training line yet.
    """
    from npp_ds.config.load import load_config

    run_dir = Path(run_dir)
    events = read_events(run_dir / "metrics.jsonl")
    if not events_named(events, "train"):
        raise UserError(f"{run_dir}/metrics.jsonl: no training line yet; wait until the run has logged its first step")
    config = load_config(file=run_dir / "config.yaml")
    schedule, costs = _schedule(config, events)
    found = newest_evaluation(run_dir)
    samples = newest_record(run_dir / "samples", RECORD_FILE)
    grid = found[1] / GRID_FILE if found else samples and samples.parent / GRID_FILE
    summary = summarize(
        config.name,
        events,
        schedule.stages,
        **costs,
        evaluation=evaluation or (found[0] if found else None),
        files=_files(run_dir, grid.parent if grid else None),
        next_steps=next_steps,
    )
    plot = plot_run(events, schedule.stages, config.name)
    write_atomic(run_dir / PLOT_FILE, lambda file: file.write(plot))
    pictures = (
        ("Training", "losses, learning rate and images per second over steps", plot),
        ("Samples", "samples, one row per class", _read(grid)),
        ("Where the model is unsure", "likelihood and accuracy by position", _read(run_dir / LIKELIHOOD_PLOT)),
    )
    write_text_atomic(run_dir / PAGE_FILE, page(summary, pictures, config.to_yaml()))
    if show:
        print_summary(summary)
    return summary
