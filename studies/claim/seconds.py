"""Seconds per step of every (patch side, batch size) in the results, measured in short runs on an idle machine."""

import os
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any

from npp_ds.distributed.process_group import Processes, join_processes, leave_processes
from npp_ds.training.metrics import events_named, read_events
from npp_ds.training.trainer import Trainer
from npp_ds.utils.files import write_json_atomic
from studies.claim.plan import Plan, Run

SECONDS_FILE = "seconds.json"
STEPS, EVERY = 60, 10  # per measurement; the first lines of the log are left out
BUSY = 0.5  # load average above which a warning is printed


def load_of(plan: Plan) -> float | None:
    """Return the load average before the measurement, None if there was none."""
    return (plan.recorded(SECONDS_FILE) or {}).get("load_before")


def read_seconds(plan: Plan) -> dict[str, float]:
    """Return the seconds per step by `key_of`, empty before they are measured."""
    return (plan.recorded(SECONDS_FILE) or {}).get("seconds_per_step", {})


def timed_stages(plan: Plan, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the stages of a result; those without dropout have `dropout_scale` 0."""
    dropout = result["keys"].get("dropout", plan.keys["training"]["dropout"])
    return [stage if dropout else {**stage, "dropout_scale": 0.0} for stage in result["stages"]]


def key_of(stage: dict[str, Any]) -> str:
    """Return the key of one of `timed_stages` in `read_seconds`."""
    return f"side {stage['patch_side']}, batch {stage['batch_size']}{'' if has_dropout(stage) else ', no dropout'}"


def has_dropout(stage: dict[str, Any]) -> bool:
    return stage.get("dropout_scale", 1) > 0


def measure_seconds(plan: Plan, out: Path) -> None:
    """Measure what the results so far need, each in a run of `STEPS` steps, and write seconds.json beside them."""
    if (load := os.getloadavg()[0]) > BUSY:
        print(
            f"load average {load:.1f}: the seconds are not those of an idle machine; wait and run this again",
            flush=True,
        )
    found = [result for part in plan.parts for run in plan.runs(part) if (result := plan.result(run))]
    stages = {key_of(stage): stage for result in found for stage in timed_stages(plan, result)}
    processes = join_processes()
    try:
        seconds = {key: _seconds_per_step(plan, stage, out, processes) for key, stage in sorted(stages.items())}
    finally:
        leave_processes()
    write_json_atomic(
        plan.results / SECONDS_FILE,
        {"seconds_per_step": seconds, "load_before": load, "threads": 1},
    )


def _seconds_per_step(plan: Plan, stage: dict[str, Any], out: Path, processes: Processes) -> float:
    run = plan.runs(min(plan.parts))[0]
    run_dir = out / "seconds" / key_of(stage).replace(", ", "-").replace(" ", "_")
    config = plan.config(Run(run.part, run.arm, run.seed), out / "codes", run_dir)
    assert config is not None  # the first arm chooses nothing
    short = {**stage, "dropout_scale": float(has_dropout(stage)), "steps": STEPS, "warmup_epochs": 0.0}
    keys = config.model_dump()
    keys["schedule"] |= {"stages": [short], "end_at_patch_side_one": False}
    keys |= {"logging": {"every": EVERY}, "checkpoint": {"every": 0}, "data": {**keys["data"], "val": None}}
    rmtree(run_dir, ignore_errors=True)
    Trainer(type(config).model_validate(keys), processes).run()
    times = [e["elapsed_seconds"] for e in events_named(read_events(run_dir / "metrics.jsonl"), "train")][1:]
    return median((b - a) / EVERY for a, b in pairwise(times))
