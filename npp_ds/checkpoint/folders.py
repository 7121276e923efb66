"""Checkpoints that are either complete or not there: their record, finding the newest whole one, removing old ones.

A folder `step-XXXXXXXX` without a COMPLETE.json that its files agree with, in size and SHA-256, is torn, whoever was
killed while making it. How one is made is in `saving.py`, what its files hold in `state_files.py`.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npp_ds.checkpoint.rank_files import MASTER, SavedState
from npp_ds.errors import UserError
from npp_ds.utils.files import sha256, write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

RECORD = "COMPLETE.json"
FORMAT = 3
READABLE_FORMATS = (2, FORMAT)
_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"step-\d{8,}\..+\.tmp")


@dataclass(frozen=True)
class CheckpointRecord:
    """What COMPLETE.json says: `step` steps of the schedule are done, the next is step number `step`.

    `optimizer_steps` of them updated the weights, those of `excluded_steps` did not. `shapes` are the parameters' and
    `kinds` what is saved of each: "master", "exp_avg", "exp_avg_sq", and "ema" where an average is kept. `config` holds
    the keys that must not change when the run is resumed; a record of format 2 has none.
    """

    step: int
    stage: int
    world_size: int
    zero_stage: int
    precision: str
    config_hash: str
    data_fingerprint: str
    optimizer_steps: int
    kinds: list[str]
    shapes: dict[str, list[int]]
    excluded_steps: list[int] = field(default_factory=list)
    rollbacks: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    format: int = FORMAT


class TornError(UserError):
    """A checkpoint without a record that can be believed; one of another version of this software is not torn."""


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def what_is_wrong(folder: Path, verify: bool = True) -> str | None:
    """None for a complete checkpoint, else the first thing that shows it torn: a missing, short or changed file.

    With `verify` it reads every file whole, several at a time; without, a change that keeps the size goes unseen.
    Raises UserError for one that cannot be read, and for another format.
    """
    try:
        record = read_record(folder)
    except TornError as error:
        return str(error)
    if folder.name != folder_of(folder.parent, record.step).name:
        return f"{folder}: its record is that of step {record.step}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda item: _what_is_wrong_with(folder / item[0], item[1], verify), record.files.items())
        return next((wrong for wrong in found if wrong), None)


def _what_is_wrong_with(path: Path, expected: dict[str, Any], verify: bool) -> str | None:
    try:
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{path}: {size} bytes, expected {expected['bytes']}"
        return (
            None if not verify or sha256(path) == expected["sha256"] else f"{path}: its SHA-256 is not the recorded one"
        )
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        raise _unreadable(path, error) from error


def write_record(folder: Path, record: CheckpointRecord) -> None:
    """Writes COMPLETE.json, atomically, with a SHA-256 of its own content."""
    content = asdict(record)
    write_json_atomic(folder / RECORD, {**content, "sha256": _digest(content)})


def read_record(folder: Path) -> CheckpointRecord:
    """Raises TornError when there is none or it was changed, UserError when it is unreadable or of another format."""
    try:
        raw = json.loads((folder / RECORD).read_text())
        found = raw["format"]
        digest = raw.pop("sha256", None)
        whole = digest == _digest(raw)
        record = CheckpointRecord(**raw) if whole and found in READABLE_FORMATS else None
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise TornError(f"{folder / RECORD}: not a readable completeness record ({error!r})") from error
    except OSError as error:
        raise _unreadable(folder / RECORD, error) from error
    if found not in READABLE_FORMATS and (whole or digest is None):
        known = " and ".join(map(str, READABLE_FORMATS))
        raise UserError(f"{folder / RECORD}: format {found}, this version reads {known}; use the npp_ds that wrote it")
    if record is None:
        raise TornError(f"{folder / RECORD}: the record does not agree with its own SHA-256")
    return record


def _unreadable(path: Path, error: OSError) -> UserError:
    """A file that cannot be read now may be whole: no reason to go on from an older checkpoint."""
    return UserError(f"{path}: {error.strerror}; mend that, or remove this checkpoint to go on from an older one")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first, complete or torn."""
    names = (_FOLDER.fullmatch(p.name) for p in checkpoints.glob("step-*"))
    return sorted((int(m.group(1)) for m in names if m), reverse=True)


def newest_complete(checkpoints: Path, verify: bool = True) -> Path | None:
    """The newest checkpoint whose files agree with its record; incomplete ones are logged and passed over.

    `verify` as in `what_is_wrong`.
    """
    for step in saved_steps(checkpoints):
        folder = folder_of(checkpoints, step)
        wrong = what_is_wrong(folder, verify)
        if wrong is None:
            return folder
        logger.warning(f"checkpoint {folder.name} is incomplete and passed over: {wrong}")
    return None


def asked_for(checkpoints: Path, step: int, verify: bool = True) -> Path:
    """The checkpoint of exactly this step. Raises UserError when it is missing or torn."""
    folder = folder_of(checkpoints, step)
    if not folder.is_dir():
        steps = ", ".join(map(str, saved_steps(checkpoints))) or "none"
        raise UserError(f"{folder}: no such checkpoint; saved steps: {steps}")
    if wrong := what_is_wrong(folder, verify):
        raise UserError(
            f"{folder}: asked for, but torn: {wrong}; name another step, or none for the newest complete one"
        )
    return folder


def checkpoint_of(
    run_dir: str | Path, step: int | None = None, kind: str = MASTER, verify: bool = True
) -> tuple[Path, CheckpointRecord]:
    """The newest complete checkpoint of a run, or that of `step`, and its record; `verify` as in `what_is_wrong`.

    Raises UserError when there is none, or none that holds weights of this `kind` ("ema": averaged ones).
    """
    checkpoints = Path(run_dir) / "checkpoints"
    folder = newest_complete(checkpoints, verify=verify) if step is None else asked_for(checkpoints, step, verify)
    if folder is None:
        raise UserError(f"{checkpoints}: no complete checkpoint; train the run first, or name another run folder")
    record = read_record(folder)
    if kind not in record.kinds:
        raise UserError(
            f"{folder}: holds no {kind} weights; set optimizer.ema_decay when training, or use the plain weights"
        )
    return folder, record


@contextmanager
def reading_checkpoint(
    folder: Path, record: CheckpointRecord, kind: str = MASTER
) -> "Iterator[Callable[[str], Tensor]]":
    """Inside, a function from a parameter's name to its whole tensor of a kind, float32 on the CPU.

    Saved by any number of processes in any ZeRO stage. Raises UserError.
    """
    with SavedState(folder, record.files, record.shapes) as saved:
        yield partial(saved.whole, kind)


def remove(folder: Path) -> None:
    """Deletes a checkpoint so that, killed in between, it is recognised as torn."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)


def remove_unfinished(checkpoints: Path) -> None:
    """Deletes what killed processes left of checkpoints that they were writing."""
    for leftover in checkpoints.glob("step-*.tmp"):
        if _TEMPORARY.fullmatch(leftover.name):
            shutil.rmtree(leftover)


def remove_old(
    checkpoints: Path,
    step: int,
    keep_last: int,
    keep_every: int,
    keep_steps: Collection[int],
) -> None:
    """Delete all but the `keep_last` newest checkpoints up to `step`, which is complete, and incomplete folders.

    Multiples of `keep_every` (0: none) and `keep_steps` stay, and so do later steps, which are none of this run's. What
    cannot be deleted is logged: no reason to stop a run.
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
        logger.warning(f"an old checkpoint could not be deleted: {error}")
