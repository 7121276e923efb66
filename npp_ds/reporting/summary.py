"""A run in figures: what its folder holds, read for people, and the closing table on the terminal."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from npp_ds.config.load import load_config
from npp_ds.config.schedule import Schedule
from npp_ds.config.schema import RunConfig
from npp_ds.data.manifest import Manifest
from npp_ds.data.store import available_manifest
from npp_ds.errors import UserError, content_of
from npp_ds.sampling.folder import EVALUATION_FILE, GRID_FILE, RECORD_FILE, newest_record
from npp_ds.training.metrics import Event, events_named, read_events, stages_begun
from npp_ds.utils.files import read_json, read_object
from npp_ds.utils.format import format_duration, make_table, plain_text

if TYPE_CHECKING:
    from rich.console import Console

    from npp_ds.checkpoint.open import Weights

PLOT_FILE, PAGE_FILE, LIKELIHOOD_PLOT = "training.png", "report.html", "likelihood.png"
VALIDATIONS = {"validation": "raw", "validation_ema": "ema"}  # event: the weights that were validated
TYPICAL = ("images_per_second", "mfu", "data_wait_share")
"""Figures of training lines whose median a stage reports."""


@dataclass(frozen=True, eq=False)
class RunData:
    """A run folder: its config, what its last start recorded, and its events by step.

    `weights` leaves out samples and evaluations of others, and events after their step.
    """

    folder: Path
    config: RunConfig
    environment: dict[str, Any]
    events: list[Event]
    weights: "Weights | None" = None

    @cached_property
    def manifest(self) -> Manifest | None:
        """That of the training shards; None if they are not on this machine."""
        return available_manifest(self.config.data.train, self.config.data.cache_dir)

    @cached_property
    def schedule(self) -> Schedule:
        """The stages that have begun as logged, the others as the config plans them; none if that cannot be known.

        Where the number of training images is not recorded and the shards are not on this machine, it follows from
        whole epochs of the stages that have begun.
        """
        begun = stages_begun(self.events)
        images = self.environment.get("training_images") or (self.manifest.num_samples if self.manifest else 0)
        images = images or max((stage.steps_per_epoch * stage.batch_size for stage in begun), default=0)
        return Schedule((*begun, *(self.config.build_schedule(images).stages[len(begun) :] if images else ())))

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The content of `evaluation_file`; {} without one."""
        if not self.evaluation_file:
            return {}
        with content_of(self.evaluation_file, "an evaluation"):
            return dict(read_json(self.evaluation_file))

    @cached_property
    def evaluation_file(self) -> Path | None:
        """The newest <folder>/samples/*/evaluation.json."""
        return self._newest(EVALUATION_FILE)

    @cached_property
    def samples(self) -> Path | None:
        """The folder of the newest samples, else of the newest evaluation."""
        newest = self._newest(RECORD_FILE) or self.evaluation_file
        return newest.parent if newest else None

    def _newest(self, name: str) -> Path | None:
        weights = self.weights
        if weights is None:
            return newest_record(self.folder / "samples", name)

        def is_wanted(record: dict[str, Any]) -> bool:
            samples = record.get("samples", record)
            return (samples["weights_sha256"], samples["weights"]) == (weights.sha256, weights.variant)

        return newest_record(self.folder / "samples", name, is_wanted)

    @cached_property
    def lines(self) -> list[Event]:
        """The training lines."""
        return events_named(self.events, "train")

    @cached_property
    def lines_by_stage(self) -> list[list[Event]]:
        """The training lines of each stage."""
        return [events_named(self.events, "train", stage.index) for stage in self.schedule.stages]

    def files(self, page: Path | None) -> list[tuple[str, str]]:
        """Return (description, path) of the files that exist, and of the `page` that is about to be written."""
        samples = self.samples
        candidates = [
            ("report", page),
            ("plot of the run", self.folder / PLOT_FILE),
            ("samples to look at", samples / GRID_FILE if samples else None),
            ("samples for metrics", samples / "samples.npz" if samples else None),
            ("evaluation", self.evaluation_file),
            ("likelihood by position", self.folder / "likelihood.json"),
            ("checkpoints", self.folder / "checkpoints"),
            ("metrics of every step", self.folder / "metrics.jsonl"),
            ("settings", self.folder / "config.yaml"),
        ]
        return [(what, str(path)) for what, path in candidates if path and (path == page or path.exists())]

    def pictures_while_training(self, most: int = 6) -> list[tuple[Event, Path]]:
        """Return (evaluation, picture of its first samples), evenly spaced in time with the first and the last one."""
        folder = self.folder / "samples" / "during"
        found = [(e, folder / f"step-{e['step']:08d}.png") for e in events_named(self.events, "evaluation")]
        found = [(event, path) for event, path in found if path.is_file()]
        last = len(found) - 1
        return [found[i] for i in sorted({round(k * last / (most - 1)) for k in range(most)})] if found else []

    def command(self) -> str:
        """Return the commands that train this run again, into another folder."""
        commit = (self.environment.get("git_commit") or "").rstrip("+")
        processes = self.environment.get("world_size", 1)
        config, copy = str(self.folder / "config.yaml"), f"run_dir={self.folder}-again"
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "npp_ds"]
        train = [*(launcher if processes > 1 else ["npp"]), "train", "--config", config, copy]
        return "\n".join([*([f"git checkout {commit}"] if commit else []), shlex.join(train)])


def read_run(folder: Path, warn: bool = True) -> RunData:
    """Read a run folder. The run may be unfinished, or have logged nothing yet. Raises UserError if it is none.

    `warn` is that of `read_events`.
    """
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: not a run folder: config.yaml is missing")
    config, environment = load_config(file=folder / "config.yaml"), read_object(folder / "environment.json")
    log = folder / "metrics.jsonl"
    return RunData(folder, config, environment, read_events(log, warn) if log.is_file() else [])


def read_run_of(weights: "Weights") -> RunData | None:
    """Read the run folder of weights as far as it is about them; None for weights that are in none."""
    if weights.config is None:
        return None
    run = read_run(weights.path)
    events = [event for event in run.events if weights.step is None or event.get("step", 0) <= weights.step]
    return replace(run, events=events, weights=weights)


def validated_by(weights: str | None) -> str:
    """Return the words after a validation that tell that of the moving average from that of the weights."""
    return " by the moving average" if weights == "ema" else ""


def validations(events: list[Event]) -> list[Event]:
    """Return the validations at patch side 1: of the weights, or of their moving average if only this was validated."""
    of_either = ([e for e in events_named(events, name) if e.get("patch_side") == 1] for name in VALIDATIONS)
    return next(filter(None, of_either), [])


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
    `validation_nll` is the last one at patch side 1, in nats per code, and `validation_weights` is "ema" if it
    is that of the moving average. Training was paused for `saving_seconds` by its
    `checkpoints` and for `evaluation_seconds` by its `evaluations`; `last_distance` is that of the last evaluation.
    `peak_memory_gb` is the most that any process held.
    """

    name: str
    stages: list[StageSummary]
    finished: bool
    token_cost: float
    flop_cost: float
    time_cost: float | None
    validation_nll: float | None
    validation_step: int | None
    validation_weights: str | None
    checkpoints: int
    saving_seconds: float
    evaluations: int
    evaluation_seconds: float
    last_distance: float | None
    peak_memory_gb: float | None
    evaluation: dict[str, Any]
    files: list[tuple[str, str]]
    next_steps: list[str]

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


def _stage_summaries(run: RunData) -> list[StageSummary]:
    summaries, elapsed = [], 0.0
    last_step = max((e["step"] for e in run.lines), default=0)
    for stage, lines in zip(run.schedule.stages, run.lines_by_stage, strict=True):
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


def summarize(run: RunData, name: str, page: Path | None = None, next_steps: Sequence[str] = ()) -> RunSummary:
    """Return the figures of a run under a name, with its files, among them the `page` that is about to be written."""
    events, summaries = run.events, _stage_summaries(run)
    saves, evaluations = events_named(events, "checkpoint"), events_named(events, "evaluation")
    validation = (validations(events) or [{}])[-1]
    return RunSummary(
        name=name,
        stages=summaries,
        finished=bool(events_named(events, "end")),
        token_cost=run.schedule.token_cost(),
        flop_cost=run.schedule.flop_cost(run.config.model.grid_size, run.config.model.training_flops),
        time_cost=_time_cost(summaries),
        validation_nll=validation.get("nll"),
        validation_step=validation.get("step"),
        validation_weights=VALIDATIONS.get(validation.get("event", "")),
        checkpoints=len(saves),
        saving_seconds=sum(e["seconds"] for e in saves),
        evaluations=len(evaluations),
        evaluation_seconds=sum(e["seconds"] for e in evaluations),
        last_distance=evaluations[-1]["frechet_distance"] if evaluations else None,
        peak_memory_gb=max(_known(run.lines, "peak_memory_gb"), default=None),
        evaluation=run.evaluation,
        files=run.files(page),
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
    costs = f"{summary.token_cost:.3f} in positions, {summary.flop_cost:.3f} in FLOPs"
    costs += f", {summary.time_cost:.3f} in measured time" if summary.time_cost is not None else ""
    rows = [("cost, next-token training = 1", costs)]
    if summary.validation_nll is not None:
        by = validated_by(summary.validation_weights)
        value = f"{summary.validation_nll:.4f} nats per code{by} after step {summary.validation_step:,}"
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
    if record.get("checkpoint_step") is not None:
        rows.append(("checkpoint of the samples", f"step {record['checkpoint_step']:,}, {record['weights']} weights"))
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
