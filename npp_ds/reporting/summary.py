"""The figures of a run, and the closing table on the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from npp_ds.config.schedule import Stage
from npp_ds.training.metrics import Event, events_named
from npp_ds.utils.format import format_duration, make_table, plain_text

if TYPE_CHECKING:
    from rich.console import Console


TYPICAL = ("images_per_second", "mfu", "data_wait_share")
"""Figures of training lines whose median a stage reports."""


@dataclass(frozen=True)
class StageSummary:
    """One stage so far; `seconds` are of training, without validation and saving.

    `images_per_second`, `mfu` and the shares of waiting time are medians over its training lines, `loss` is that of the
    last line; None if no line has the figure.
    """

    patch_side: int
    epochs: float
    steps: int
    planned_steps: int
    images: int
    seconds: float
    images_per_second: float | None
    mfu: float | None
    data_wait_share: float | None
    loss: float | None


@dataclass(frozen=True)
class RunSummary:
    """A run in numbers. Costs are relative to next-token training on the same images: below 1 is cheaper.

    `token_cost` counts trained positions, `flop_cost` FLOPs; `time_cost` is measured: the time the images took at each
    stage's rate over the time they would have taken at the rate of the stage with patch side 1 (None without one).
    `validation_nll` is the last one at patch side 1, in nats per code. Training was paused for `saving_seconds` by its
    `checkpoints` and for `evaluation_seconds` by its `evaluations`; `last_distance` is that of the last evaluation.
    `peak_memory_gb` is the most that any process held.
    """

    name: str
    stages: list[StageSummary]
    finished: bool
    token_cost: float | None = None
    flop_cost: float | None = None
    time_cost: float | None = None
    validation_nll: float | None = None
    validation_step: int | None = None
    checkpoints: int = 0
    saving_seconds: float = 0.0
    evaluations: int = 0
    evaluation_seconds: float = 0.0
    last_distance: float | None = None
    peak_memory_gb: float | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    files: list[tuple[str, str]] = field(default_factory=list)
    next_steps: list[str] = field(default_factory=list)

    def total(self, name: str) -> float:
        """Return the sum of a figure over the stages."""
        return sum(getattr(stage, name) for stage in self.stages)


def _known(lines: list[Event], name: str) -> list[float]:
    """Return a figure of the lines that have it; lines of older runs may not."""
    return [e[name] for e in lines if e.get(name) is not None]


def _typical(lines: list[Event], name: str) -> float | None:
    """Return the median of a figure, without the stage's first line if there are more: it includes the warm-up."""
    values = _known(lines, name)
    return median(values[1:] or values) if values else None


def _stage_summaries(events: list[Event], stages: Sequence[Stage]) -> list[StageSummary]:
    summaries, elapsed = [], 0.0
    last_step = max((e["step"] for e in events_named(events, "train")), default=0)
    for stage in stages:
        lines = events_named(events, "train", stage.index)
        steps = min(max(last_step - stage.start_step, 0), stage.steps)
        until = lines[-1]["elapsed_seconds"] if lines else elapsed
        summaries.append(
            StageSummary(
                patch_side=stage.patch_side,
                epochs=steps / stage.steps_per_epoch,
                steps=steps,
                planned_steps=stage.steps,
                images=steps * stage.batch_size,
                seconds=until - elapsed,
                **{name: _typical(lines, name) for name in TYPICAL},
                loss=lines[-1]["loss"] if lines else None,
            )
        )
        elapsed = until
    return summaries


def _time_cost(stages: list[StageSummary]) -> float | None:
    done = [(s.patch_side, s.images, s.images_per_second) for s in stages if s.images and s.images_per_second]
    plain_rate = next((rate for side, _, rate in done if side == 1), None)
    if plain_rate is None:
        return None
    return sum(images / rate for _, images, rate in done) * plain_rate / sum(images for _, images, _ in done)


def summarize(
    name: str,
    events: list[Event],
    stages: Sequence[Stage],
    *,
    token_cost: float | None = None,
    flop_cost: float | None = None,
    evaluation: dict[str, Any] | None = None,
    files: Sequence[tuple[str, str]] = (),
    next_steps: Sequence[str] = (),
) -> RunSummary:
    """Return the figures of a run from its events (`read_events`), its stage table and what else is known.

    `evaluation` is what `npp_ds.evaluation.evaluate.evaluate_images` returned; `files` are (description, path).
    """
    summaries = _stage_summaries(events, stages)
    saves, evaluations = events_named(events, "checkpoint"), events_named(events, "evaluation")
    plain = [e for e in events_named(events, "validation") if e["patch_side"] == 1]
    return RunSummary(
        name=name,
        stages=summaries,
        finished=bool(events_named(events, "end")),
        token_cost=token_cost,
        flop_cost=flop_cost,
        time_cost=_time_cost(summaries),
        validation_nll=plain[-1]["nll"] if plain else None,
        validation_step=plain[-1]["step"] if plain else None,
        checkpoints=len(saves),
        saving_seconds=sum(e["seconds"] for e in saves),
        evaluations=len(evaluations),
        evaluation_seconds=sum(e["seconds"] for e in evaluations),
        last_distance=evaluations[-1]["frechet_distance"] if evaluations else None,
        peak_memory_gb=max(_known(events_named(events, "train"), "peak_memory_gb"), default=None),
        evaluation=dict(evaluation or {}),
        files=list(files),
        next_steps=list(next_steps),
    )


STAGE_COLUMNS = ("stage", "patch side", "epochs", "steps", "time", "images/s", "last loss")

SHARES = {"MFU": "mfu", "waiting for data": "data_wait_share"}
"""Shares of a stage (of the GPU's peak, or of its time) that are shown if they are known."""


def stage_rows(summary: RunSummary) -> list[tuple[str, ...]]:
    """Return the cells under `STAGE_COLUMNS`: a row per stage, and a last row of totals."""
    rows: list[tuple[str, ...]] = []
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
    """Return (name, value with unit) of all results that are known."""
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
        value = f"{summary.checkpoints}, training paused for {format_duration(summary.saving_seconds)} ({share:.2%})"
        rows.append(("checkpoints", value))
    if summary.evaluations and (seconds := summary.total("seconds")):
        share = summary.evaluation_seconds / seconds
        value = f"{summary.evaluations}, {format_duration(summary.evaluation_seconds)} beside training ({share:.2%})"
        rows.append(("evaluations while training", f"{value}, last Frechet distance {summary.last_distance:.4g}"))
    for what, name in SHARES.items():
        shares = [(s.patch_side, getattr(s, name)) for s in summary.stages if getattr(s, name) is not None]
        if shares:
            rows.append((what, ", ".join(f"{share:.1%} at side {side}" for side, share in shares)))
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
    """Print the stages, the results, the paths of all files and what to run next."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    state = "" if summary.finished else " (not finished)"
    *stages, totals = stage_rows(summary)
    console.print(make_table(STAGE_COLUMNS, stages, title=f"{summary.name}{state}", totals=totals))
    if results := result_rows(summary):
        grid = Table.grid(padding=(0, 2))
        for what, value in results:
            grid.add_row(plain_text(what), plain_text(value))
        console.print(plain_text("\nresults", "bold"))
        console.print(grid)
    files = [f"{what:<24}{path}" for what, path in summary.files]
    for title, lines in (("files", files), ("next", summary.next_steps)):
        if lines:
            console.print(plain_text(f"\n{title}", "bold"))
        for line in lines:
            console.print(plain_text(line), soft_wrap=True)
