"""The closing table of a run on the terminal."""

from typing import TYPE_CHECKING

from npp_ds.reporting.summary import RunSummary
from npp_ds.utils.format import format_duration

if TYPE_CHECKING:
    from rich.console import Console

STAGE_COLUMNS = ("stage", "patch side", "epochs", "steps", "time", "images/s", "last loss")

SHARES = {"MFU": "mfu", "waiting for data": "data_wait_share", "waiting in exchanges": "communication_wait_share"}
"""Figures of a stage that are shown where they are known: shares of the GPU's peak, or of the time."""


def stage_rows(summary: RunSummary) -> list[tuple[str, ...]]:
    """The cells under `STAGE_COLUMNS`, one row per stage and a last row of totals."""
    rows = []
    for number, s in enumerate(summary.stages, start=1):
        steps = f"{s.steps:,}" if s.steps == s.planned_steps else f"{s.steps:,} of {s.planned_steps:,}"
        rate = f"{s.images_per_second:,.0f}" if s.images_per_second else "-"
        loss = f"{s.loss:.4f}" if s.loss is not None else "-"
        rows.append((str(number), str(s.patch_side), f"{s.epochs:.3g}", steps, format_duration(s.seconds), rate, loss))
    seconds = summary.total("seconds")
    rate = f"{summary.total('images') / seconds:,.0f}" if seconds else "-"
    steps = f"{summary.total('steps'):,}"
    rows.append(("all", "", f"{summary.total('epochs'):.3g}", steps, format_duration(seconds), rate, ""))
    return rows


def result_rows(summary: RunSummary) -> list[tuple[str, str]]:
    """(what, value with unit) of everything known about the run's outcome."""
    rows = []
    costs = (("positions", summary.token_cost), ("FLOPs", summary.flop_cost), ("measured time", summary.time_cost))
    known = [f"{cost:.3f} in {what}" for what, cost in costs if cost is not None]
    if known:
        rows.append(("cost, next-token training = 1", ", ".join(known)))
    if summary.validation_nll is not None:
        value = f"{summary.validation_nll:.4f} nats per code after step {summary.validation_step:,}"
        rows.append(("validation at patch side 1", value))
    if summary.checkpoints and (seconds := summary.total("seconds")):
        share = summary.saving_seconds / seconds
        value = (
            f"{summary.checkpoints}, training stood still for {format_duration(summary.saving_seconds)} ({share:.2%})"
        )
        rows.append(("checkpoints", value))
    if summary.evaluations and (seconds := summary.total("seconds")):
        share = summary.evaluation_seconds / seconds
        value = f"{summary.evaluations}, {format_duration(summary.evaluation_seconds)} beside training ({share:.2%})"
        rows.append(("evaluations while training", f"{value}, last Frechet distance {summary.last_distance:.4g}"))
    for what, name in SHARES.items():
        known = [(s.patch_side, getattr(s, name)) for s in summary.stages if getattr(s, name) is not None]
        if known:
            rows.append((what, ", ".join(f"{share:.1%} at side {side}" for side, share in known)))
    if summary.peak_memory_gb is not None:
        rows.append(("peak memory", f"{summary.peak_memory_gb:.3g} GB in the process with the most"))
    return rows + _evaluation_rows(summary.evaluation)


def _evaluation_rows(evaluation: dict) -> list[tuple[str, str]]:
    if not evaluation:
        return []
    record = evaluation.get("samples", {})
    rows = []
    if "cfg_scale" in record:
        drawn = f"CFG {record['cfg_scale']:g}, temperature {record['temperature']:g}, top-k {record['top_k'] or 'all'}"
        value = f"{evaluation['num_images']:,} images, {drawn}, top-p {record['top_p']:g}, seed {record['seed']}"
        rows.append(("samples", value))
    if "class_agreement" in evaluation:
        real = evaluation.get("reference_class_agreement")
        beside = f" (real images: {real:.1%})" if real is not None else ""
        rows.append(("samples showing the class asked for", f"{evaluation['class_agreement']:.1%}{beside}"))
    count = evaluation["num_reference_images"]
    against = f"{f'{count:,} ' if count else ''}real images, features of {evaluation['extractor']}"
    rows.append(("Frechet distance", f"{evaluation['frechet_distance']:.4g} to {against}"))
    return rows


def print_summary(summary: RunSummary, console: "Console | None" = None) -> None:
    """Prints the stages, the results, where every file lies and what to run next."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    state = "" if summary.finished else " (not finished)"
    table = Table(title=f"{summary.name}{state}", title_justify="left", title_style="bold")
    for column in STAGE_COLUMNS:
        table.add_column(column, justify="right")
    *stages, totals = stage_rows(summary)
    for row in stages:
        table.add_row(*row)
    table.add_section()
    table.add_row(*totals, style="bold")
    console.print(table)
    if results := result_rows(summary):
        grid = Table.grid(padding=(0, 2))
        for what, value in results:
            grid.add_row(Text(what), Text(value))
        console.print(Text("\nresults", style="bold"))
        console.print(grid)
    files = [f"{what:<24}{path}" for what, path in summary.files]
    for title, lines in (("files", files), ("next", summary.next_steps)):
        if lines:
            console.print(Text(f"\n{title}", style="bold"))
        for line in lines:
            console.print(Text(line), soft_wrap=True)
