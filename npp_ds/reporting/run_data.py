"""What the folder of a run holds, read for its report: settings, environment, events, stages, evaluations, pictures."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from npp_ds.config.load import load_config
from npp_ds.config.schedule import Schedule
from npp_ds.config.schema import RunConfig
from npp_ds.data.manifest import Manifest
from npp_ds.data.store import available_manifest
from npp_ds.errors import UserError, content_of
from npp_ds.sampling.folder import GRID_FILE, RECORD_FILE, newest_record
from npp_ds.training.metrics import Event, events_named, read_events, recorded_environment, stages_begun
from npp_ds.utils.files import read_json

PLOT_FILE, PAGE_FILE, LIKELIHOOD_PLOT = "training.png", "report.html", "likelihood.png"


@dataclass(frozen=True, eq=False)
class RunData:
    """The content of a run folder; `manifest` is that of the training shards, None if they are not on this machine.

    `evaluation` is the content of the newest <folder>/samples/*/evaluation.json, and `samples` its folder, else that of
    the newest samples.
    """

    folder: Path
    config: RunConfig
    environment: dict[str, Any]
    events: list[Event]
    manifest: Manifest | None
    evaluation: dict[str, Any] | None
    samples: Path | None

    @cached_property
    def schedule(self) -> Schedule:
        """The stage table; without the training shards only the stages that have begun."""
        if self.manifest is None:
            return Schedule(tuple(stages_begun(self.events)))
        return self.config.build_schedule(self.manifest.num_samples)

    @cached_property
    def lines_by_stage(self) -> list[list[Event]]:
        """The training lines of each stage."""
        return [events_named(self.events, "train", stage.index) for stage in self.schedule.stages]

    def costs(self) -> dict[str, float]:
        """Return the costs relative to next-token training; none if not all stages are known."""
        schedule, model = self.schedule, self.config.model
        if not (self.manifest or events_named(self.events, "end")):
            return {}
        flop_cost = schedule.flop_cost(model.grid_size, model.training_flops)
        return {"token_cost": schedule.token_cost(), "flop_cost": flop_cost}

    def files(self, page: Path) -> list[tuple[str, str]]:
        """Return (description, path) of the files that exist, and of the `page` that is about to be written."""
        samples = self.samples
        candidates = [
            ("report", page),
            ("plot of the run", self.folder / PLOT_FILE),
            ("samples to look at", samples / GRID_FILE if samples else None),
            ("samples for metrics", samples / "samples.npz" if samples else None),
            ("evaluation", samples / "evaluation.json" if samples else None),
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


def newest_evaluation(run_dir: Path) -> tuple[dict[str, Any], Path] | None:
    """Return the content of the newest <run_dir>/samples/*/evaluation.json and its folder, or None."""
    found = newest_record(run_dir / "samples", "evaluation.json")
    if found is None:
        return None
    with content_of(found, "an evaluation"):
        return dict(read_json(found)), found.parent


def read_run(run_dir: str | Path) -> RunData:
    """Read a run folder. The run may be unfinished. Raises UserError if it is none or has no training line yet."""
    folder = Path(run_dir)
    events = read_events(folder / "metrics.jsonl")
    if not events_named(events, "train"):
        raise UserError(f"{folder}/metrics.jsonl: no training line yet; wait until the run has logged its first step")
    config = load_config(file=folder / "config.yaml")
    evaluation = newest_evaluation(folder)
    samples = newest_record(folder / "samples", RECORD_FILE)
    return RunData(
        folder=folder,
        config=config,
        environment=recorded_environment(folder),
        events=events,
        manifest=available_manifest(config.data.train, config.data.cache_dir),
        evaluation=evaluation[0] if evaluation else None,
        samples=evaluation[1] if evaluation else samples.parent if samples else None,
    )
