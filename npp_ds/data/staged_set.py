"""The files of a staged set in a cache folder, which others may share: written with hashes, trusted only if unchanged.

A set is trusted if this user (or root) owns its folder and files, nobody else may write to them, none is a link, and
its arrays have the hashes of `record.json`.
"""

import errno
import hashlib
import logging
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from npp_ds.data.manifest import Manifest
from npp_ds.data.shards import read_set
from npp_ds.errors import UserError
from npp_ds.utils.files import open_regular, parse_json, write_json_atomic, write_text_atomic
from npp_ds.utils.format import utc_now
from npp_ds.utils.screen import ANY_RANK

logger = logging.getLogger(__name__)

CODES, LABELS, SOURCE, RECORD = "codes.npy", "labels.npy", "source.txt", "record.json"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def open_arrays(folder: Path, manifest: Manifest, verify: bool) -> list[np.ndarray] | None:
    """Map the codes uint16 [images, crops, tokens] and labels int64 [images] of the staged set in `folder`.

    Return None if it is absent, damaged, staged by an earlier version, or may be written by others. `verify` reads the
    arrays and compares them with their SHA-256 and with the numbers of codes and classes. Raises UserError if the
    folder or an array belongs to another user.
    """
    shape = (manifest.num_samples, manifest.num_crops, manifest.num_tokens)
    arrays: list[np.ndarray] = []
    try:
        check_own(folder, folder.lstat())
        if not (record := read_record(folder)):
            return None
        for name, dtype, of_shape, limit in (
            (CODES, np.dtype("<u2"), shape, manifest.vocab_size),
            (LABELS, np.dtype("<i8"), shape[:1], manifest.num_classes),
        ):
            with _open_own(folder / name) as file:
                arrays.append(_map(file, dtype, of_shape))
                if verify:
                    _verify(file, dtype, limit, str(record.get(name)))
    except OSError:
        return None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        logger.warning(f"{folder / name}: {error}; staging the set anew", extra=ANY_RANK)
        return None
    return arrays


def _map(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Map the array in a .npy file, which is then read up to its values. Raises ValueError if it is another one."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a version 1.0 .npy file")
    found = np.lib.format.read_array_header_1_0(file)
    if found != (shape, False, dtype):
        raise ValueError(f"{found[2]} {list(found[0])}, expected {dtype} {list(shape)}")
    start = file.tell()
    array = np.asarray(np.memmap(file, dtype, "r", start, shape))  # which moves the file's position
    file.seek(start)
    return array


def _verify(file: BinaryIO, dtype: np.dtype, limit: int, sha256: str) -> None:
    """Read the values of an array to the end of its file. Raises ValueError if they are not those of the record."""
    digest = hashlib.sha256()
    for block in iter(partial(file.read, 1 << 20), b""):
        digest.update(block)
        values = np.frombuffer(block, dtype)
        if values.min() < 0 or values.max() >= limit:
            raise ValueError(f"holds values outside of 0 to {limit - 1}")
    if digest.hexdigest() != sha256:
        raise ValueError(f"found SHA-256 {digest.hexdigest()}, expected {sha256}")


def read_source(folder: Path) -> str | None:
    """Return what the set in `folder` was staged from; None if that is unknown or not to be trusted."""
    try:
        with _open_own(folder / SOURCE) as file:
            return file.read().decode()
    except (OSError, ValueError):
        return None


def read_record(folder: Path) -> dict[str, Any]:
    """Return the time of staging, `staged_at`, and the SHA-256 of each array; {} if there is no record to trust."""
    try:
        with _open_own(folder / RECORD) as file:
            record = parse_json(file.read())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _open_own(path: Path) -> BinaryIO:
    """Open a file of a staged set. Raises OSError for links, and if others may write to it or to its folder.

    Raises UserError if it, or its folder, belongs to another user.
    """
    check_own(path.parent, path.parent.lstat())
    file = open_regular(path, os.O_NOFOLLOW)
    try:
        check_own(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def check_own(path: Path, status: os.stat_result) -> None:
    """Raise UserError for a file or folder of another user, PermissionError for a link or if others may change it."""
    check_owner(path, status)
    if status.st_mode & _OTHERS_MAY_WRITE or stat.S_ISLNK(status.st_mode):
        raise PermissionError(errno.EPERM, "A link, or others may write to it", str(path))


def check_owner(path: Path, status: os.stat_result) -> None:
    """Raise UserError for a file or folder of another user."""
    if status.st_uid not in (os.geteuid(), 0):
        raise UserError(
            f"{path}: belongs to the user {status.st_uid}, expected this one, {os.geteuid()}, because its owner could "
            "change the data; remove it, or name a cache folder of your own in data.cache_dir."
        )


def write_set(shard_dir: Path, source: str, manifest: Manifest, folder: Path) -> None:
    """Write the files of a staged set into an empty folder, read-only. Raises UserError if the shards are damaged."""
    hashes = _write_arrays(shard_dir, manifest, folder)
    describe(folder, source, manifest)
    write_json_atomic(folder / RECORD, {"staged_at": utc_now(), **hashes})
    for path in folder.iterdir():
        path.chmod(0o444)


def describe(folder: Path, source: str, manifest: Manifest) -> None:
    """Write the manifest of a set into a folder, and what it is staged from."""
    manifest.save(folder)
    write_text_atomic(folder / SOURCE, source)


def _write_arrays(shard_dir: Path, manifest: Manifest, folder: Path) -> dict[str, str]:
    """Write the arrays and return the SHA-256 of the values of each.

    They are written with write(), not through a map: on a full tmpfs a map would end the process with SIGBUS.
    """
    digest = hashlib.sha256()
    shape = (manifest.num_samples, manifest.num_crops, manifest.num_tokens)
    labels: list[int] = []
    with (folder / CODES).open("wb") as codes_file, (folder / LABELS).open("wb") as labels_file:
        np.lib.format.write_array_header_1_0(codes_file, {"descr": "<u2", "fortran_order": False, "shape": shape})
        for codes, label in read_set(shard_dir, manifest):
            codes_file.write(codes.data)
            digest.update(codes.data)
            labels.append(label)
        np.save(labels_file, np.array(labels, "<i8"))
        for file in (codes_file, labels_file):
            file.flush()
            os.fsync(file.fileno())
    return {CODES: digest.hexdigest(), LABELS: hashlib.sha256(np.array(labels, "<i8").data).hexdigest()}
