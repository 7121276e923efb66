"""Checkpoints that are either complete or not there: one protocol for saving, one for finding and loading.

All ranks write into `step-XXXXXXXX.tmp`; each hashes and flushes its share of the files; the first rank writes
`COMPLETE.json` with every file's size and SHA-256, renames the folder to `step-XXXXXXXX` and then replaces `latest`.
A folder without a COMPLETE.json that its files agree with is torn, whoever was killed while making it.
"""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from npp_ds.errors import UserError
from npp_ds.files import fsync_directory, sha256, write_json_atomic, write_text_atomic
from npp_ds.training.deepspeed_import import import_deepspeed

RECORD = "COMPLETE.json"
FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class CheckpointRecord:
    """What COMPLETE.json says: `step` optimizer steps are done, the next is step number `step`."""

    step: int
    stage: int
    world_size: int
    zero_stage: int
    precision: str
    config_hash: str
    data_fingerprint: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


class OtherFormatError(UserError):
    """A checkpoint of another version of this software: not torn, and not to be passed over."""


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def what_is_wrong(folder: Path) -> str | None:
    """None for a complete checkpoint, else the first thing that shows it torn: a missing, short or changed file."""
    try:
        record = read_record(folder)
    except OtherFormatError:
        raise
    except UserError as error:
        return str(error)
    if folder != folder_of(folder.parent, record.step):
        return f"{folder}: its record is that of step {record.step}"
    for name, expected in record.files.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{path}: {path.stat().st_size} bytes, expected {expected['bytes']}"
        if sha256(path) != expected["sha256"]:
            return f"{path}: its SHA-256 is not the recorded one"
    return None


def read_record(folder: Path) -> CheckpointRecord:
    """Raises UserError when there is none or it cannot be read."""
    try:
        raw = json.loads((folder / RECORD).read_text())
        if raw["format"] != FORMAT:
            raise OtherFormatError(
                f"{folder / RECORD}: format {raw['format']}, this version reads {FORMAT}; use the npp_ds that wrote it"
            )
        return CheckpointRecord(**raw)
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / RECORD}: not a readable completeness record ({error!r})") from error


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps that have a checkpoint folder, newest first, complete or torn."""
    names = (_FOLDER.fullmatch(p.name) for p in checkpoints.glob("step-*"))
    return sorted((int(m.group(1)) for m in names if m), reverse=True)


def newest_complete(checkpoints: Path, warn=print) -> Path | None:
    """The newest checkpoint whose files agree with its record; torn ones are named to `warn` and passed over."""
    for step in saved_steps(checkpoints):
        folder = folder_of(checkpoints, step)
        wrong = what_is_wrong(folder)
        if wrong is None:
            return folder
        warn(f"WARNING: checkpoint {folder.name} is torn and passed over: {wrong}")
    return None


def asked_for(checkpoints: Path, step: int) -> Path:
    """The checkpoint of exactly this step. Raises UserError when it is missing or torn."""
    folder = folder_of(checkpoints, step)
    if not folder.is_dir():
        steps = ", ".join(map(str, saved_steps(checkpoints))) or "none"
        raise UserError(f"{folder}: no such checkpoint; saved steps: {steps}")
    if wrong := what_is_wrong(folder):
        raise UserError(
            f"{folder}: asked for, but torn: {wrong}; name another step, or none for the newest complete one"
        )
    return folder


@contextlib.contextmanager
def only_data_is_unpickled() -> Iterator[None]:
    """Inside, `torch.load` rebuilds tensors and plain values only, whatever its caller asked for.

    DeepSpeed 0.19.8 loads with weights_only=False; torch lets this variable overrule it. Three of DeepSpeed's own
    plain classes appear in its files.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _flush_and_hash(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _check_names(names: list[str], record: CheckpointRecord) -> None:
    """Raises RuntimeError unless DeepSpeed wrote one optimizer file per process, and in ZeRO-3 as many model files."""
    models = record.world_size if record.zero_stage == 3 else 1
    for ending, expected in (("optim_states.pt", record.world_size), ("model_states.pt", models)):
        found = sum(name.endswith(ending) for name in names)
        if found != expected:
            raise RuntimeError(
                f"checkpoint of step {record.step}: {found} files *{ending}, expected {expected}: {names}"
            )


def save(engine: Any, checkpoints: Path, record: CheckpointRecord) -> Path:
    """Writes a checkpoint of a DeepSpeed engine by the protocol above; called by all ranks together."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folder = folder_of(checkpoints, record.step)
    temporary = folder.with_name(folder.name + ".tmp")
    if rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    dist.barrier()
    engine.save_checkpoint(str(checkpoints), tag=temporary.name, client_state={}, save_latest=False)
    dist.barrier()
    listed: list[Any] = [sorted(p.name for p in temporary.iterdir())]
    dist.broadcast_object_list(listed)
    names: list[str] = listed[0]
    _check_names(names, record)
    mine = {name: _flush_and_hash(temporary / name) for name in names[rank::world_size]}
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, mine)
    if rank == 0:
        files = {name: entry for part in parts for name, entry in sorted(part.items())}
        write_json_atomic(temporary / RECORD, {**asdict(record), "files": files})
        fsync_directory(temporary)
        if folder.exists():
            remove(folder)
        temporary.rename(folder)
        fsync_directory(checkpoints)
        write_text_atomic(checkpoints / "latest", folder.name)
    dist.barrier()
    return folder


def load(engine: Any, folder: Path) -> None:
    """Puts a checkpoint's weights and optimizer state into a DeepSpeed engine; called by all ranks together."""
    with only_data_is_unpickled():
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise RuntimeError(f"{folder}: DeepSpeed loaded nothing from it")


def load_weights(run_dir: str | Path, step: int | None = None) -> tuple[dict[str, torch.Tensor], int]:
    """The float32 weights of a run as {name: tensor} on the CPU, and the step they are from.

    From the newest complete checkpoint or that of `step`, saved by any number of processes in any ZeRO stage.
    Raises UserError when there is none.
    """
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoints = Path(run_dir) / "checkpoints"
    folder = newest_complete(checkpoints) if step is None else asked_for(checkpoints, step)
    if folder is None:
        raise UserError(f"{checkpoints}: no complete checkpoint; train the run first, or name another run folder")
    with only_data_is_unpickled(), contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=folder.name)
    return {name: tensor.clone() for name, tensor in weights.items()}, read_record(folder).step


def remove(folder: Path) -> None:
    """Deletes a checkpoint so that, killed in between, it is recognised as torn."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)


def remove_old(checkpoints: Path, step: int, keep_last: int, keep_steps: set[int], warn=print) -> None:
    """Deletes all but the `keep_last` newest checkpoints up to `step` and those of `keep_steps`, and unfinished saves.

    Later steps are none of this run's and stay. What cannot be deleted is named to `warn`: no reason to stop a run.
    """
    recorded = [s for s in saved_steps(checkpoints) if s <= step and (folder_of(checkpoints, s) / RECORD).is_file()]
    try:
        for old in recorded[keep_last:]:
            if old not in keep_steps:
                remove(folder_of(checkpoints, old))
        for leftover in checkpoints.glob("step-*.tmp"):
            shutil.rmtree(leftover)
    except OSError as error:
        warn(f"WARNING: an old checkpoint could not be deleted: {error}")
