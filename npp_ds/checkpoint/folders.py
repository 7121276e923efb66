"""The checkpoint folders of a run: write and read their record, find the newest complete one, remove old ones.

A folder `step-XXXXXXXX` is complete when its COMPLETE.json is intact and its files have the recorded sizes and SHA-256.
Every other folder is incomplete, whatever interrupted its writer. `saver.py` writes the folders, `rank_files.py` the
files in them.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from npp_ds.errors import UserError
from npp_ds.utils.files import plain_name, read_json, sha256, write_json_atomic, write_text_atomic

RECORD = "COMPLETE.json"
FORMAT = 3
READABLE_FORMATS = (2, FORMAT)
_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"step-\d{8,}\..+\.tmp")

logger = logging.getLogger(__name__)


_Count = Annotated[int, Field(ge=0, lt=2**63)]
_FileName = Annotated[str, AfterValidator(plain_name)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class CheckpointRecord:
    """The content of COMPLETE.json. Steps 0 .. `step` - 1 of the schedule are done; a resumed run begins with `step`.

    `optimizer_steps` of these steps updated the weights; those in `excluded_steps` did not. `shapes` holds the shape of
    each parameter. `kinds` names the states that are saved of each: "master" (the fp32 weights), "exp_avg",
    "exp_avg_sq", and "ema" if the run keeps an average. `files` maps each file name to its "bytes" and "sha256".
    `config` holds the config keys that must not change on resume; it is None in records of format 2.
    """

    step: _Count
    stage: _Count
    world_size: _Count
    zero_stage: int
    precision: str
    config_hash: str
    data_fingerprint: str
    optimizer_steps: _Count
    kinds: list[str]
    shapes: dict[str, list[_Count]]
    excluded_steps: list[_Count] = field(default_factory=list)
    rollbacks: _Count = 0
    files: dict[_FileName, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    format: int = FORMAT


class IncompleteCheckpointError(UserError):
    """A checkpoint has no intact record. A record that another version of npp_ds wrote is not incomplete."""


def write_latest(checkpoints: Path, folder: Path) -> None:
    """Name the newest checkpoint in the file `latest`, for people and scripts; a failure is ignored."""
    with suppress(OSError):
        write_text_atomic(checkpoints / "latest", folder.name)


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def find_problem(folder: Path, verify: bool = True) -> str | None:
    """Return None for a complete checkpoint, else what makes it incomplete: a missing, truncated or changed file.

    `verify` also compares the SHA-256 of every file. This reads all files whole, up to eight at a time. Without it a
    change that keeps the size of a file stays undetected. Raises UserError for files that cannot be read and for an
    unknown format.
    """
    try:
        record = read_record(folder)
    except IncompleteCheckpointError as error:
        return str(error)
    if folder.name != folder_of(folder.parent, record.step).name:
        return f"{folder}: its record is that of step {record.step}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda item: _find_problem_of_file(folder / item[0], item[1], verify), record.files.items())
        return next((problem for problem in found if problem), None)


def _find_problem_of_file(path: Path, expected: dict[str, Any], verify: bool) -> str | None:
    try:
        if not path.is_file():
            return f"{path}: missing, or no regular file"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{path}: {size} bytes, expected {expected['bytes']}"
        if verify and sha256(path) != expected["sha256"]:
            return f"{path}: its SHA-256 is not the recorded one"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        raise _unreadable(path, error) from error
    return None


def write_record(folder: Path, record: CheckpointRecord) -> None:
    """Write COMPLETE.json atomically, with a SHA-256 of its own content."""
    content = asdict(record)
    write_json_atomic(folder / RECORD, {**content, "sha256": _digest(content)})


def read_record(folder: Path) -> CheckpointRecord:
    """Read COMPLETE.json.

    Raises IncompleteCheckpointError if the record is missing or damaged, UserError if it cannot be read or has an
    unknown format.
    """
    try:
        raw = read_json(folder / RECORD)
        found = raw["format"]
        digest = raw.pop("sha256", None)
        intact = digest == _digest(raw)
        record = CheckpointRecord(**raw) if intact and found in READABLE_FORMATS else None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise IncompleteCheckpointError(f"{folder / RECORD}: {where:.80}: {problem['msg']}") from error
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise IncompleteCheckpointError(f"{folder / RECORD}: not a readable completeness record ({error!r})") from error
    except OSError as error:
        raise _unreadable(folder / RECORD, error) from error
    if found not in READABLE_FORMATS and (intact or digest is None):
        known = " and ".join(map(str, READABLE_FORMATS))
        raise UserError(f"{folder / RECORD}: format {found}, this version reads {known}; use the npp_ds that wrote it")
    if record is None:
        raise IncompleteCheckpointError(f"{folder / RECORD}: the record does not agree with its own SHA-256")
    return record


def _unreadable(path: Path, error: OSError) -> UserError:
    """Return the error for a file that cannot be read now: it may be intact, so no older checkpoint replaces it."""
    return UserError(f"{path}: {error.strerror}; fix that, or remove this checkpoint to resume from an older one")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def saved_steps(checkpoints: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, complete or incomplete, newest first."""
    names = (_FOLDER.fullmatch(p.name) for p in checkpoints.glob("step-*"))
    return sorted((int(m.group(1)) for m in names if m), reverse=True)


def newest_complete(checkpoints: Path, verify: bool = True) -> Path | None:
    """Return the folder of the newest complete checkpoint, None if there is none.

    Logs a warning for each incomplete checkpoint that it skips. `verify` is that of `find_problem`.
    """
    for step in saved_steps(checkpoints):
        folder = folder_of(checkpoints, step)
        problem = find_problem(folder, verify)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is incomplete and skipped: %s", folder.name, problem)
    return None


def complete_at_step(checkpoints: Path, step: int, verify: bool = True) -> Path:
    """Return the folder of the checkpoint of exactly this step. Raises UserError if it is missing or incomplete."""
    folder = folder_of(checkpoints, step)
    if not folder.is_dir():
        steps = ", ".join(map(str, saved_steps(checkpoints))) or "none"
        raise UserError(f"{folder}: no such checkpoint; saved steps: {steps}")
    if problem := find_problem(folder, verify):
        raise UserError(
            f"{folder}: requested, but incomplete: {problem}; name another step, or none for the newest complete one"
        )
    return folder


def remove(folder: Path) -> None:
    """Delete a checkpoint. If the process is killed meanwhile, what remains is recognised as incomplete."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)


def remove_unfinished(checkpoints: Path) -> None:
    """Delete the temporary folders of processes that were killed while they wrote a checkpoint."""
    for leftover in checkpoints.glob("step-*.tmp"):
        if _TEMPORARY.fullmatch(leftover.name):
            shutil.rmtree(leftover)


def remove_old(checkpoints: Path, step: int, keep_last: int, keep_every: int, keep_steps: Collection[int]) -> None:
    """Delete old checkpoints, except the `keep_last` newest up to `step`, multiples of `keep_every`, and `keep_steps`.

    The checkpoint of `step` must be complete. Remains of partly deleted checkpoints are deleted too. Checkpoints of
    later steps stay: they belong to another run. A failed deletion is only logged, because it need not stop the run.
    """
    old = [s for s in saved_steps(checkpoints) if s < step]
    recorded = [s for s in old if (folder_of(checkpoints, s) / RECORD).is_file()]
    kept = set(recorded[: keep_last - 1])
    kept |= {s for s in recorded if s in keep_steps or (keep_every > 0 and s % keep_every == 0)}
    try:
        for s in old:
            if s not in kept:
                remove(folder_of(checkpoints, s))
    except OSError as error:
        logger.warning("an old checkpoint could not be deleted: %s", error)
