"""`npp status`: where runs are, from the files in their folders alone. Imports no torch."""

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npp_ds.checkpoint import folders
from npp_ds.errors import UserError
from npp_ds.reporting.summary import VALIDATIONS, RunData, read_run, validated_by, validations
from npp_ds.training.lease import LEASE_BYTES, SLOWEST_HEARTBEAT, Owner
from npp_ds.training.metrics import Event, events_named
from npp_ds.training.throughput import StepCosts, step_flops
from npp_ds.utils.files import read_small
from npp_ds.utils.format import counted, format_duration, plain_text

if TYPE_CHECKING:
    from rich.console import RenderableType

BLOCK_WIDTH = 78
WATCH_SECONDS = 5.0
PATIENCE_SECONDS = 60.0
"""Age of a heartbeat (or six of its intervals, if that is more) from which a run on another machine has stopped."""
STYLES = {"running": "green", "starting": "green", "finished": "blue", "stopped": "yellow", "stalled": "red"}
WARNINGS = {
    "spike": "the loss spiked {}",
    "nonfinite": "loss or gradients were not finite {}",
    "left_out": "a step was left out {}",
    "rollback": "the run was rolled back {}",
    "save_failed": "a checkpoint could not be written {}",
}
"""Event -> what a warning says of it; {} stands for how often."""


@dataclass(frozen=True)
class RunStatus:
    """A run at this moment; what is not known is None.

    `state` is starting, running, finished, stopped, or stalled (no step for too long, or ended by the watchdog). Loss,
    rates and `step` are those of the last training line. FLOPs are model FLOPs so far and those of next-token training
    on the same images; `planned_cost` is their ratio for the whole run. Times are those of training, in seconds;
    `process_seconds` count as many processes as the last start had.
    """

    run: str
    name: str
    state: str
    owner: str | None
    processes: int | None
    stage: int | None
    stages: int | None
    patch_side: int | None
    epoch: int | None
    step: int
    stage_end_step: int | None
    total_steps: int | None
    loss: float | None
    learning_rate: float | None
    validation_nll: float | None
    validation_step: int | None
    validation_weights: str | None
    frechet_distance: float | None
    evaluation_step: int | None
    images_per_second: float | None
    mfu: float | None
    data_wait_share: float | None
    elapsed_seconds: float
    process_seconds: float | None
    flops: float | None
    next_token_flops: float | None
    saved_share: float | None
    planned_cost: float | None
    stage_eta_seconds: float | None
    eta_seconds: float | None
    eta_at_most: bool
    checkpoint_step: int | None
    restarts: int | None
    warnings: list[str]


def read_status(run: Path) -> RunStatus:
    """Return the status of a run folder. Raises UserError, in one line, if it is none or is damaged."""
    try:
        status = _status(run)
        _rows(status)  # a text in place of a number can be read, but not shown
        return status
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        what = str(error) if isinstance(error, UserError | OSError) else f"not as `npp train` writes it: {error!r}"
        text = " ".join(what.split())
        raise UserError(text if str(run) in text else f"{run}: {text}") from error


def _status(folder: Path) -> RunStatus:
    run = read_run(folder, warn=False)
    config, events, stages, model = run.config, run.events, run.schedule.stages, run.config.model
    last: Event = run.lines[-1] if run.lines else {}
    costs = StepCosts(stages, model, run.lines)
    step, left = last.get("step", 0), costs.left(last.get("step", 0))
    current = stages[(events_named(events, "stage") or [{"stage": 0}])[-1]["stage"]] if stages else None
    validation = (validations(events) or [{}])[-1]
    evaluation = (events_named(events, "evaluation") or [{}])[-1]
    processes, elapsed = run.environment.get("world_size"), last.get("elapsed_seconds", 0.0)
    spent, plain = (_flops(run, step, coarse) for coarse in (True, False))
    state, owner = _state(run, costs if left else None, last)
    return RunStatus(
        run=str(folder),
        name=config.name,
        state=state,
        owner=owner,
        processes=processes,
        stage=current.index + 1 if current else None,
        stages=len(stages) or None,
        patch_side=current.patch_side if current else None,
        epoch=last.get("epoch"),
        step=step,
        stage_end_step=current.end_step if current else None,
        total_steps=stages[-1].end_step if stages else None,
        loss=last.get("loss"),
        learning_rate=last.get("learning_rate"),
        validation_nll=validation.get("nll"),
        validation_step=validation.get("step"),
        validation_weights=VALIDATIONS.get(validation.get("event", "")),
        frechet_distance=evaluation.get("frechet_distance"),
        evaluation_step=evaluation.get("step"),
        images_per_second=last.get("images_per_second"),
        mfu=last.get("mfu"),
        data_wait_share=last.get("data_wait_share"),
        elapsed_seconds=elapsed,
        process_seconds=elapsed * processes if processes else None,
        flops=spent,
        next_token_flops=plain,
        saved_share=1 - spent / plain if plain else None,
        planned_cost=run.schedule.flop_cost(model.grid_size, model.training_flops) if stages else None,
        stage_eta_seconds=left[current.index] if left and current else None,
        eta_seconds=sum(left) if left else None,
        eta_at_most=costs.left_at_most(step),
        checkpoint_step=_newest_checkpoint(folder / "checkpoints"),
        restarts=max(run.environment["starts"] - 1, 0) if "starts" in run.environment else None,
        warnings=_warnings(folder, events),
    )


def _flops(run: RunData, step: int, coarse: bool) -> int:
    """Return the FLOPs of the first `step` steps at the stages' patch sides or (not `coarse`) at side 1."""
    return sum(
        max(min(step, s.end_step) - s.start_step, 0) * step_flops(run.config.model, s, s.patch_side if coarse else 1)
        for s in run.schedule.stages
    )


def _newest_checkpoint(checkpoints: Path) -> int | None:
    """Return the step of the newest checkpoint whose files are there in their sizes."""
    steps = folders.saved_steps(checkpoints)
    return next((s for s in steps if not folders.find_problem(folders.folder_of(checkpoints, s), verify=False)), None)


def _state(run: RunData, costs: StepCosts | None, last: Event) -> tuple[str, str | None]:
    """Return (state, owner); the owner only of a run that is not over.

    Ages compare with the clock of this machine, except for silence: there both times are of one file system.
    """
    lease, metrics, stacks = (_modified(run.folder / name) for name in ("lease.json", "metrics.jsonl", "stalled.txt"))
    owner = Owner.from_json(read_small(run.folder / "lease.json", LEASE_BYTES)) if lease else None
    if owner and _lives(owner, time.time() - lease):
        between = run.config.logging.every * costs.seconds_per_step(last["stage"]) if costs else 0.0
        is_silent = lease - metrics > max(run.config.watch.stall_seconds or 900.0, 3 * between)
        return ("starting" if not last else "stalled" if is_silent else "running"), str(owner)
    if events_named(run.events, "end"):
        return "finished", None
    return ("stalled" if stacks and stacks >= metrics else "stopped"), None


def _lives(owner: Owner, age: float) -> bool:
    """Return whether a start has not ended, as far as the lease shows that it wrote `age` seconds ago."""
    is_over = owner.released or owner.is_dead_here(socket.gethostname())
    return not is_over and age <= max(PATIENCE_SECONDS, 6 * min(owner.heartbeat_seconds, SLOWEST_HEARTBEAT))


def _modified(path: Path) -> float:
    """Return when a file was written, 0 if it does not exist."""
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def _warnings(run: Path, events: list[Event]) -> list[str]:
    found = []
    for name, text in WARNINGS.items():
        if named := events_named(events, name):
            count, last = ("once", "") if len(named) == 1 else (f"{len(named)} times", "last ")
            found.append(f"{text.format(count)}, {last}after step {named[-1]['step']:,}")
    if (run / "stalled.txt").is_file():
        found.append("a process made no progress: stalled.txt has its stacks")
    return found


def _rows(s: RunStatus) -> list[tuple[str, str]]:
    """Return (what, text) of all that is known of a run."""
    rows = []
    if s.stage is not None:
        epoch = f", epoch {s.epoch}" if s.epoch is not None else ""
        rows.append(("stage", f"{s.stage} of {s.stages}, patch side {s.patch_side}{epoch}"))
    total = f" of {s.total_steps:,} ({s.step / s.total_steps:.0%})" if s.total_steps else ""
    rows.append(
        ("step", f"{s.step:,}{total}" if s.step else f"none logged so far{total and f', of {s.total_steps:,}'}")
    )
    if s.loss is not None:
        rate = f", learning rate {s.learning_rate:.2e}" if s.learning_rate is not None else ""
        rows.append(("loss", f"{s.loss:.4f} nats per code{rate}"))
    if s.validation_nll is not None:
        by = validated_by(s.validation_weights)
        rows.append(("validation", f"{s.validation_nll:.4f} at side 1{by}, after step {s.validation_step:,}"))
    if s.frechet_distance is not None:
        rows.append(("samples", f"Frechet distance {s.frechet_distance:.4g}, after step {s.evaluation_step:,}"))
    if s.images_per_second is not None:
        mfu = f", MFU {s.mfu:.1%}" if s.mfu is not None else ""
        wait = f", {s.data_wait_share:.1%} waiting for data" if s.data_wait_share is not None else ""
        rows.append(("speed", f"{s.images_per_second:,.0f} images/s{mfu}{wait}"))
    if s.flops and s.next_token_flops and s.saved_share is not None:
        spent = f"{s.flops:.3g} FLOPs in {format_duration(s.elapsed_seconds)}"
        spent += f" on {counted(s.processes, 'process')}" if s.processes else ""
        saved = f"{1 - s.saved_share:.3f} of next-token training ({s.saved_share:.0%} saved)"
        rows += [("spent", spent), ("cost", f"{saved}; {s.planned_cost:.3f} when finished")]
    if s.eta_seconds is not None and s.stage_eta_seconds is not None and s.state != "finished":
        bound = "at most " if s.eta_at_most else ""
        stage, run = format_duration(s.stage_eta_seconds), format_duration(s.eta_seconds)
        rows.append(("eta", f"{stage} (stage), {bound}{run} (run)"))
    restarts = "" if s.restarts is None else f"; {counted(s.restarts, 'restart')}"
    rows.append(("checkpoint", ("none" if s.checkpoint_step is None else f"step {s.checkpoint_step:,}") + restarts))
    rows += [("warning", text) for text in s.warnings]
    return rows


def _block(status: RunStatus) -> "RenderableType":
    """Return what a run looks like on a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    where = f" on {status.owner}" if status.owner else ""
    name, run, state = plain_text(status.name, "bold"), plain_text(f" ({status.run}): "), status.state
    title = Text.assemble(name, run, (state, STYLES[state]), plain_text(where))
    grid = Table.grid(padding=(0, 2), pad_edge=True)
    for what, text in _rows(status):
        grid.add_row(what, plain_text(text, "yellow" if what == "warning" else ""))
    return Group(title, grid, "")


def _view(found: Sequence[RunStatus], width: int) -> "RenderableType":
    """Return the blocks of runs, side by side as far as `width` allows."""
    from rich.columns import Columns

    return Columns(map(_block, found), width=min(BLOCK_WIDTH, width - 2))


def _look(runs: Sequence[Path]) -> tuple[list[RunStatus], dict[str, str]]:
    """Return the status of each run that can be read, and of the others why not."""
    found, problems = [], {}
    for run in runs:
        try:
            found.append(read_status(run))
        except UserError as error:
            problems[str(run)] = str(error)
    return found, problems


def show_status(runs: Sequence[Path], watch: bool = False, as_json: bool = False) -> bool:
    """Print the status of runs, side by side where there is space; with `watch` again and again, until Ctrl-C.

    Return whether all of them could be read; of others one line says why not.
    """
    from rich.console import Console, Group
    from rich.live import Live

    console = Console()

    def show(found: list[RunStatus], problems: dict[str, str]) -> None:
        if as_json:
            broken = [{"run": run, "state": "unreadable", "problem": text} for run, text in problems.items()]
            print(json.dumps([*map(asdict, found), *broken]), flush=True)
            return
        if found:
            console.print(_view(found, console.width))
        for problem in problems.values():
            console.print(plain_text(problem, "red"), soft_wrap=True)

    in_place = watch and console.is_terminal and not as_json
    found, problems = _look(runs)
    with (
        suppress(KeyboardInterrupt),
        Live(console=console, screen=True, auto_refresh=False) if in_place else nullcontext() as live,
    ):
        while watch:
            if live:
                broken = (plain_text(problem, "red") for problem in problems.values())
                live.update(Group(_view(found, console.width), *broken), refresh=True)
            else:
                show(found, problems)
            time.sleep(WATCH_SECONDS)
            found, problems = _look(runs)
    if in_place or not watch:
        show(found, problems)
    return not problems
