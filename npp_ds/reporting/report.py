"""The report of a run: its picture, its page and its table, from the files in its folder."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npp_ds.config.schedule import Schedule
from npp_ds.errors import UserError
from npp_ds.reporting.plot import plot_run
from npp_ds.reporting.summary import RunSummary, summarize
from npp_ds.reporting.table import STAGE_COLUMNS, print_summary, result_rows, stage_rows
from npp_ds.training.events import Event, entered_stages, of_kind, read_events
from npp_ds.utils.files import write_atomic, write_text_atomic

if TYPE_CHECKING:
    from npp_ds.config.schema import RunConfig

PLOT_FILE, PAGE_FILE, LIKELIHOOD_PLOT = "training.png", "report.html", "likelihood.png"

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; font-size: 1.2rem; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; border-bottom: 1px solid var(--line); }
table.stages td, table.stages th { text-align: right; } table.stages tr:last-child { font-weight: bold; }
td { vertical-align: top; } img { max-width: 100%; background: white; border-radius: 6px; }
pre { font: .9em ui-monospace, monospace; background: var(--soft); padding: 1rem; overflow-x: auto; }
"""


def _rows(rows: Sequence[Sequence[str]], tag: str = "td") -> str:
    cells = ("".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) for row in rows)
    return "".join(f"<tr>{row}</tr>\n" for row in cells)


def _image(png: bytes, description: str) -> str:
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def page(
    summary: RunSummary,
    plot: bytes,
    grid: bytes | None = None,
    likelihood: bytes | None = None,
    config_text: str = "",
) -> str:
    """The report as one HTML page that needs no other file: `plot`, `grid` and `likelihood` are PNGs, embedded."""
    name = html.escape(summary.name)
    parts = [
        f"<h1>{name}</h1><p>{'finished' if summary.finished else 'not finished'}</p>",
        f"<h2>Stages</h2><table class=stages>{_rows([STAGE_COLUMNS], 'th')}{_rows(stage_rows(summary))}</table>",
    ]
    if results := result_rows(summary):
        parts.append(f"<h2>Results</h2><table>{_rows(results)}</table>")
    parts.append(f"<h2>Training</h2>{_image(plot, 'losses, learning rate and images per second over steps')}")
    if grid is not None:
        parts.append(f"<h2>Samples</h2>{_image(grid, 'samples, one row per class')}")
    if likelihood is not None:
        parts.append(f"<h2>Where the model is unsure</h2>{_image(likelihood, 'likelihood and accuracy by position')}")
    if summary.files:
        parts.append(f"<h2>Files</h2><table>{_rows(summary.files)}</table>")
    if summary.next_steps:
        parts.append(f"<h2>Next</h2><pre>{html.escape(chr(10).join(summary.next_steps))}</pre>")
    if config_text:
        parts.append(f"<details><summary>config.yaml</summary><pre>{html.escape(config_text)}</pre></details>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )


def newest_evaluation(run_dir: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest <run_dir>/samples/*/evaluation.json and its folder, None when there is none."""
    found = sorted(run_dir.glob("samples/*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    return (json.loads(found[-1].read_text()), found[-1].parent) if found else None


def _newest_grid(run_dir: Path) -> Path | None:
    return max(run_dir.glob("samples/*/grid.png"), key=lambda path: path.stat().st_mtime, default=None)


def _schedule(config: "RunConfig", events: list[Event]) -> tuple[Schedule, dict[str, float]]:
    """The stage table and its costs; where the training shards are not at hand, the stages that have begun, and the
    costs only if those are all.
    """
    from npp_ds.data.store import available_manifest

    manifest = available_manifest(config.data.train, config.data.cache_dir)
    schedule = config.build_schedule(manifest.num_samples) if manifest else Schedule(tuple(entered_stages(events)))
    if not (manifest or of_kind(events, "end")):
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
    """Writes <run_dir>/training.png and report.html, prints the closing table when `show`, and returns the figures.

    `evaluation` defaults to the newest evaluation.json under <run_dir>/samples. Works on an unfinished run too. Raises
    UserError when the folder is no run or holds no training line yet.
    """
    from npp_ds.config.load import load_config

    run_dir = Path(run_dir)
    events = read_events(run_dir / "metrics.jsonl")
    if not of_kind(events, "train"):
        raise UserError(f"{run_dir}/metrics.jsonl: no training line yet; let the run log its first step")
    config = load_config(file=run_dir / "config.yaml")
    schedule, costs = _schedule(config, events)
    found = newest_evaluation(run_dir)
    grid = found[1] / "grid.png" if found else _newest_grid(run_dir)
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
    pictures = (path.read_bytes() if path and path.is_file() else None for path in (grid, run_dir / LIKELIHOOD_PLOT))
    text = page(summary, plot, *pictures, config.to_yaml())
    write_text_atomic(run_dir / PAGE_FILE, text)
    if show:
        print_summary(summary)
    return summary
