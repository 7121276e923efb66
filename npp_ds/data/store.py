"""Staging: a set of shards verified and unpacked once per node into one read-only array that all processes map.

The cache folder of a set is named by its manifest's fingerprint and appears by one rename under a lock: a folder that
is there is whole, whoever was killed while making it, and a changed manifest means another folder.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npp_ds.data.shards import Manifest, check
from npp_ds.errors import UserError
from npp_ds.files import fsync_directory

SHARED_MEMORY = Path("/dev/shm")
_CODES, _LABELS = "codes.npy", "labels.npy"


@dataclass(frozen=True, eq=False)
class CodeStore:
    """A staged set: `codes` uint16 [images, crops, tokens] and `labels` int64 [images], read-only maps of `folder`."""

    codes: np.ndarray
    labels: np.ndarray
    manifest: Manifest
    folder: Path

    def __len__(self) -> int:
        return len(self.labels)


def stage(
    shard_dir: str | Path,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CodeStore:
    """The set in `shard_dir` as mapped arrays, unpacked into `cache_dir` unless it already lies there.

    Any number of processes may call this at once: one unpacks (calling `progress(images done, images in all)`), the
    others wait. Without `cache_dir` it is /dev/shm/npp_ds-<uid> when the set takes at most half of what is free there,
    else ~/.cache/npp_ds. UserError for a missing or bad set, an empty one, and a full disk.
    """
    manifest = Manifest.load(shard_dir)
    if manifest.num_samples == 0:
        raise UserError(f"{shard_dir}: holds no samples; expected at least one. Tokenize some images into it.")
    name = manifest.fingerprint()
    roots = [Path(cache_dir)] if cache_dir is not None else _default_roots()
    if store := _open_first(roots, name, manifest):
        return store
    try:
        # Judged under the first root's lock: beside a process that is filling that root, it would look full.
        with _locked(roots[0], name):
            root = _choose_root(roots, manifest)
            with _locked(root, name) if root != roots[0] else contextlib.nullcontext():
                if store := _open_first(roots, name, manifest):
                    return store
                _remove_abandoned(root)
                _unpack(Path(shard_dir), manifest, root / name, progress)
    except OSError as error:
        raise UserError(
            f"{error.filename or roots[0]}: {error.strerror} while staging {shard_dir} ({_bytes_needed(manifest):,} "
            "bytes); free some space, or name a cache folder on a local disk that is writable and large enough."
        ) from error
    store = _open(root / name, manifest)
    if store is None:
        raise UserError(f"{root / name}: removed or changed while it was being staged; run again.")
    return store


def _open_first(roots: list[Path], name: str, manifest: Manifest) -> CodeStore | None:
    return next((store for root in roots if (store := _open(root / name, manifest))), None)


def _open(folder: Path, manifest: Manifest) -> CodeStore | None:
    """The staged set in `folder`; None when it is not there or its files do not have the size that they must have."""
    try:
        codes = np.load(folder / _CODES, mmap_mode="r")
        labels = np.load(folder / _LABELS, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    shape = (manifest.num_samples, manifest.num_crops, manifest.num_tokens)
    if (codes.dtype, codes.shape, labels.dtype, labels.shape) != (np.uint16, shape, np.int64, shape[:1]):
        return None
    return CodeStore(np.asarray(codes), np.asarray(labels), manifest, folder)


def _bytes_needed(manifest: Manifest) -> int:
    return manifest.num_samples * (manifest.num_crops * manifest.num_tokens * 2 + 8)


def _default_roots() -> list[Path]:
    """Shared memory when this user has, or can make, a private folder there; then the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npp_ds"
    shared = SHARED_MEMORY / f"npp_ds-{os.getuid()}"
    try:
        shared.mkdir(mode=0o700, exist_ok=True)
        status = shared.lstat()
    except OSError:
        return [home]
    return [shared, home] if shared.is_dir() and status.st_uid == os.getuid() and not shared.is_symlink() else [home]


def _choose_root(roots: list[Path], manifest: Manifest) -> Path:
    needed = _bytes_needed(manifest)
    for root in roots[:-1]:
        if shutil.disk_usage(root).free >= 2 * needed:
            return root
    roots[-1].mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(roots[-1]).free) < needed:
        raise UserError(
            f"{roots[-1]}: {free:,} bytes free, {needed:,} needed to stage the set; "
            "free some space, or name a cache folder on a larger disk."
        )
    return roots[-1]


@contextlib.contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Holds the lock of one set under `root`; the kernel lets go of it when the process dies, however it dies."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_abandoned(root: Path) -> None:
    """Deletes what killed processes left half-written under `root`, of any set whose lock nobody else holds."""
    for temporary in root.glob("*.tmp"):
        with temporary.with_suffix(".lock").open("w") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary, ignore_errors=True)


def _unpack(shard_dir: Path, manifest: Manifest, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Writes the arrays beside `folder`, flushes them to disk and renames; the caller holds the lock."""
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_arrays(shard_dir, manifest, temporary, progress)
        manifest.save(temporary)
        fsync_directory(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(folder.parent)


def _write_arrays(shard_dir: Path, manifest: Manifest, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Streams with write(), not through a map: on a full tmpfs a map would end the process with SIGBUS."""
    shape = (manifest.num_samples, manifest.num_crops, manifest.num_tokens)
    labels: list[int] = []
    with (folder / _CODES).open("wb") as codes_file, (folder / _LABELS).open("wb") as labels_file:
        np.lib.format.write_array_header_1_0(codes_file, {"descr": "<u2", "fortran_order": False, "shape": shape})

        def accept(codes: np.ndarray, label: int) -> None:
            codes_file.write(codes.data)
            labels.append(label)

        for problem in check(shard_dir, manifest, accept, progress):
            raise UserError(f"{problem} (`npp shards verify {shard_dir}` lists every problem)")
        np.save(labels_file, np.array(labels, np.int64))
        for file in (codes_file, labels_file):
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o444)
