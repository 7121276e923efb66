"""The folder of a run: its settings, its environment, and the checkpoint that a start resumes from."""

import logging
import os
import platform
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch

import npp_ds
from npp_ds.checkpoint import folders
from npp_ds.checkpoint.folders import CheckpointRecord
from npp_ds.config.load import read_yaml
from npp_ds.config.schema import RunConfig
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.training.metrics import events_named, read_events
from npp_ds.utils.files import read_object, write_json_atomic, write_text_atomic
from npp_ds.utils.format import utc_now
from npp_ds.utils.records import git_commit

logger = logging.getLogger(__name__)

REPLACED_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "sample_log.jsonl", "checkpoints/latest")
"""Files of a run folder that a start replaces atomically, through a temporary file beside them."""


def check_settings(config: RunConfig) -> None:
    """Raise UserError when the run folder belongs to a run with other settings."""
    path = config.directory / "config.yaml"
    if path.is_file() and (different := config.differences_from(read_yaml(path))):
        raise UserError(
            f"{path}: this folder holds a run with other settings ({'; '.join(different)}); "
            "set run_dir to a new folder, or these keys back"
        )


def check_shared(run_dir: Path, token: str, patience: float = 60.0) -> None:
    """Check that this process sees the lease that the first one has just taken, within `patience` seconds.

    A network file system may show it late. Raises UserError.
    """
    deadline = time.monotonic() + patience
    path = run_dir / "lease.json"
    while not (path.is_file() and token in path.read_text(errors="replace")):
        if time.monotonic() > deadline:
            raise UserError(
                f"{path.absolute()} on {socket.gethostname()}: not that of the first process; all processes need "
                "one run folder: set run_dir to a folder that all nodes share, and start all in one directory"
            )
        time.sleep(0.5)


def write_config(config: RunConfig) -> None:
    """Write config.yaml, the resolved config."""
    write_text_atomic(config.directory / "config.yaml", config.to_yaml())


def record_start(config: RunConfig, processes: Processes, images: int) -> None:
    """Write environment.json: date, commit, versions and device of this start, and the number of starts that trained.

    Where an earlier version did not count them there was one.
    """
    path = config.directory / "environment.json"
    recorded = read_object(path)
    starts = recorded.get("starts", int(bool(recorded)))
    write_json_atomic(path, {**_environment(processes), "training_images": images, "starts": 1 + starts})


def checkpoint_to_resume(
    config: RunConfig, data_fingerprint: str, from_step: int | None
) -> tuple[Path, CheckpointRecord] | None:
    """Return the checkpoint of `from_step`, else the newest complete one; None for a run that has saved nothing yet.

    Raises UserError when the one asked for is missing or incomplete, when all are incomplete, and when settings or data
    differ from those it was saved with.
    """
    checkpoints = config.directory / "checkpoints"
    _remove_leftovers(config.directory)
    if from_step is None:
        folder = folders.newest_complete(checkpoints)
    else:
        folder = folders.complete_at_step(checkpoints, from_step)
    saved = _newest_that_was_saved(config.directory)
    if folder is None:
        steps = folders.saved_steps(checkpoints) or ([saved] if saved is not None else [])
        if steps:
            raise UserError(
                f"{checkpoints}: none of its checkpoints ({', '.join(map(str, steps))}) is complete; "
                "restore one, or remove the run folder to start from the beginning"
            )
        if (config.directory / "metrics.jsonl").is_file():
            logger.info(f"{config.directory}: an earlier start saved no checkpoint; starting from the beginning")
        return None
    record = folders.read_record(folder)
    if from_step is None and saved is not None and saved > record.step:
        gone = folders.folder_of(checkpoints, saved)
        logger.warning(f"{gone.name} was saved and is not complete any more; resuming from {folder.name}")
    if record.data_fingerprint != data_fingerprint:
        raise UserError(
            f"{folder}: trained on other shards than those in data.train ({config.data.train}), as the "
            "fingerprint of their manifest shows; name the shards it was trained on, or set run_dir to a new folder"
        )
    _check_saved_config(folder, record, config)
    if from_step is not None:
        _set_aside_later_than(checkpoints, from_step)
    return folder, record


def _remove_leftovers(run_dir: Path) -> None:
    """Delete what killed starts left of files and checkpoints that they were writing; the lease is ours."""
    for path in (run_dir / name for name in REPLACED_FILES):
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)
    folders.remove_unfinished(run_dir / "checkpoints")


def _newest_that_was_saved(run_dir: Path) -> int | None:
    """Return the last step whose checkpoint the metrics report as saved."""
    path = run_dir / "metrics.jsonl"
    # Opening the log for this start warns of broken lines.
    saves = events_named(read_events(path, warn=False, most_bytes=None), "checkpoint") if path.is_file() else []
    return saves[-1]["step"] if saves else None


def _set_aside_later_than(checkpoints: Path, step: int) -> None:
    """Rename the checkpoints of later steps, so that the next start resumes from what this one saves."""
    for later in folders.saved_steps(checkpoints):
        if later > step:
            folder = folders.folder_of(checkpoints, later)
            names = (f"set-aside-{folder.name}{f'-{number}' if number else ''}" for number in count())
            aside = next(path for path in map(checkpoints.joinpath, names) if not os.path.lexists(path))
            folder.rename(aside)
            logger.info(f"{folder.name}: set aside as {aside.name}, because step {step} was asked for")
    folders.write_latest(checkpoints, folders.folder_of(checkpoints, step))


def _check_saved_config(folder: Path, record: CheckpointRecord, config: RunConfig) -> None:
    """Raise UserError when a checkpoint was saved with other settings."""
    if record.config is None:  # format 2: only config.yaml holds them, which `check_settings` has compared
        if not (path := config.directory / "config.yaml").is_file():
            raise UserError(f"{path}: missing, and {folder.name} was saved without its settings; restore that file")
    elif different := config.differences_from(record.config):
        raise UserError(
            f"{folder}: saved by a run with other settings ({'; '.join(different)}); "
            "set run_dir to a new folder, or these keys back"
        )


def _environment(processes: Processes) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("torch", "deepspeed", "numpy", "flash-attn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cuda = processes.device.type == "cuda"
    return {
        "started_at": utc_now(),
        "git_commit": git_commit(),
        "npp_ds": npp_ds.__version__,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(processes.device) if cuda else platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "world_size": processes.world_size,
    }
