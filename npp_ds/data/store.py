"""Staging: verifies a set of shards and unpacks it, once per node, into one read-only array that all processes map.

The cache folder of a set is named by the fingerprint of its manifest and appears by one rename under a lock. So a
folder that exists is complete, whatever was killed while it was made, and a changed manifest gets another folder.
In a shared cache nothing of another user is used, and at each start one process of those that share the cache compares
the arrays with the hashes of their record.
Shards behind a URL are first fetched into a second folder, which survives an interruption and is removed after that.
"""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npp_ds.config.schema import DataSection
from npp_ds.data import remote
from npp_ds.data.manifest import MANIFEST_NAME, Manifest
from npp_ds.data.staged_set import (
    SOURCE,
    check_owner,
    describe,
    open_arrays,
    read_record,
    read_source,
    write_set,
)
from npp_ds.errors import UserError
from npp_ds.utils.files import fsync_directory, lock, nearest_folder, open_lock
from npp_ds.utils.screen import ANY_RANK

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, eq=False)
class CodeStore:
    """A staged set, mapped read-only from `folder`: `codes` uint16 [images, crops, tokens], `labels` int64 [images]."""

    codes: np.ndarray
    labels: np.ndarray
    manifest: Manifest
    folder: Path

    def __len__(self) -> int:
        return len(self.labels)


def stage(shard_dir: str | Path, cache_dir: str | Path | None = None) -> CodeStore:
    """Return the set in `shard_dir`, a folder or a source for `remote`, as arrays mapped from `cache_dir`.

    Any number of processes may call this at once: one of them fetches and unpacks the set if it is not staged yet, and
    the others wait. Environment variables in the paths are those of this machine (`/local/$USER/train`). Without
    `cache_dir` it is /dev/shm/npp_ds-<uid> if the set takes at most half of the free space there, else ~/.cache/npp_ds.
    Raises UserError for a missing, damaged or empty set, for a full disk, and for cache files of another user.
    """
    began = time.time_ns()
    shard_dir = expand_variables(shard_dir)
    manifest = load_manifest(shard_dir)
    name, source = manifest.fingerprint(), _source(shard_dir)
    needed = _bytes_needed(manifest, source)
    roots = _roots(cache_dir)
    if store := _verified(roots, name, manifest, began):
        return store
    try:
        # The root is chosen under the lock of the first one, which looks full while another process fills it.
        with _locked(roots[0], name, source):
            if store := _verified(roots, name, manifest, began):
                return store
            root = _choose_root(roots, name, needed)
            with _locked(root, name, source) if root != roots[0] else contextlib.nullcontext():
                if store := _verified(roots, name, manifest, began):
                    return store
                _log_change(source, name, roots)
                for folder in roots:
                    _remove_abandoned(folder, source, name)
                _fill(source, manifest, root / name)
    except OSError as error:
        raise UserError(
            f"{error.filename or roots[0]}: {error.strerror} while staging {shard_dir} ({needed:,} "
            "bytes); free some space, or name a cache folder on a local disk that is writable and large enough."
        ) from error
    store = _open(root / name, manifest, verify=False)
    if store is None:
        raise UserError(f"{root / name}: removed or changed while it was being staged; run again.")
    return store


def stage_sets(data: DataSection) -> tuple[CodeStore, CodeStore | None]:
    """Return the staged training set of a run and, where it has one, its validation set. Raises what `stage` raises."""
    return stage(data.train, data.cache_dir), stage(data.val, data.cache_dir) if data.val else None


def load_manifest(shard_dir: str | Path) -> Manifest:
    """Read the manifest of a set in a folder or behind a URL. Raises UserError if it is missing, bad or empty."""
    shard_dir = expand_variables(shard_dir)
    manifest = remote.load_manifest(shard_dir) if remote.is_remote(shard_dir) else Manifest.load(shard_dir)
    if manifest.num_samples == 0:
        raise UserError(f"{shard_dir}: holds no samples; expected at least one. Tokenize some images into it.")
    return manifest


def find_staged(manifest: Manifest, cache_dir: str | Path | None = None) -> CodeStore | None:
    """Return the set of this manifest if it is staged, else None. Does not read the arrays."""
    name = manifest.fingerprint()
    return _first(_open(root / name, manifest, verify=False) for root in _roots(cache_dir))


def staging_folder(shard_dir: str | Path, manifest: Manifest, cache_dir: str | Path | None = None) -> tuple[Path, int]:
    """Return the cache folder that `stage` would choose now, and the bytes that it would write into it.

    Shards that an interrupted download has fetched do not count. Writes nothing. Raises UserError if the disk is full.
    """
    needed, name = _bytes_needed(manifest, _source(expand_variables(shard_dir))), manifest.fingerprint()
    root = _choose_root(_roots(cache_dir), name, needed)
    return root, needed - _fetched_bytes(root, name)


def available_manifest(shard_dir: str | Path, cache_dir: str | Path | None = None) -> Manifest | None:
    """Return the manifest without using the network: that of the folder, else of the copy staged last, else None."""
    shard_dir = expand_variables(shard_dir)
    if not remote.is_remote(shard_dir) and (Path(shard_dir) / MANIFEST_NAME).is_file():
        return Manifest.load(shard_dir)
    staged = _staged_from(_source(shard_dir), _roots(cache_dir))
    return Manifest.load(staged[-1]) if staged else None


def expand_variables(path: str | Path) -> str | Path:
    """Replace the environment variables in a path by their values on this machine; a URL or command stays as it is."""
    return path if remote.is_remote(path) else os.path.expandvars(path)


def _source(shard_dir: str | Path) -> str:
    """Return one text for one set, whatever the working directory."""
    return shard_dir.rstrip("/") if remote.is_remote(shard_dir) else str(Path(shard_dir).resolve())


def _staged_from(source: str, roots: list[Path]) -> list[Path]:
    """Return this user's folders of sets staged from `source`, damaged ones too, the newest by their record last."""
    folders = [path.parent for root in roots for path in root.glob(f"*/{SOURCE}") if path.parent.suffix == ""]
    return sorted((f for f in folders if read_source(f) == source), key=lambda f: str(read_record(f).get("staged_at")))


def _log_change(source: str, name: str, roots: list[Path]) -> None:
    if earlier := [folder for folder in _staged_from(source, roots) if folder.name != name]:
        logger.info(
            f"{source}: the shards have changed since they were staged in {earlier[-1]}; staging them anew. "
            "The earlier copy stays for runs that use it: remove it when none does.",
            extra=ANY_RANK,
        )


def _first(stores: Iterable[CodeStore | None]) -> CodeStore | None:
    return next(filter(None, stores), None)


def _verified(roots: list[Path], name: str, manifest: Manifest, began: int) -> CodeStore | None:
    return _first(_open_verified(root, name, manifest, began) for root in roots)


def _open_verified(root: Path, name: str, manifest: Manifest, began: int) -> CodeStore | None:
    """Map a staged set whose arrays have been compared with their hashes since `began`, a time in ns; None without one.

    The processes of a start arrive together: the first one reads the arrays (6.6 GB of ImageNet) and notes the time,
    the others wait for it. Where there are no locks, or the cache is read-only, each process reads them.
    """
    if not (root / name).is_dir():
        return None
    try:
        with open_lock(path := root / f"{name}.verified.lock") as file:
            check_owner(path, os.fstat(file.fileno()))
            lock(file)
            file.seek(0)
            noted = file.read(20)
            is_recent = noted.isdecimal() and int(noted) >= began
            if (store := _open(root / name, manifest, verify=not is_recent)) and not is_recent:
                file.truncate(0)
                file.write(str(time.time_ns()))
            return store
    except OSError:
        return _open(root / name, manifest, verify=True)


def _open(folder: Path, manifest: Manifest, verify: bool) -> CodeStore | None:
    arrays = open_arrays(folder, manifest, verify)
    return CodeStore(arrays[0], arrays[1], manifest, folder) if arrays else None


def _bytes_needed(manifest: Manifest, source: str) -> int:
    """Return the bytes of the arrays, and of the shards beside them if these are fetched first."""
    fetched = sum(shard.bytes for shard in manifest.shards) if remote.is_remote(source) else 0
    return manifest.num_samples * (manifest.num_crops * manifest.num_tokens * 2 + 8) + fetched


def _roots(cache_dir: str | Path | None) -> list[Path]:
    return [Path(expand_variables(cache_dir))] if cache_dir is not None else _default_roots()


def _default_roots() -> list[Path]:
    """Return this user's private folder in shared memory, if there can be one, then the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npp_ds"
    shared = SHARED_MEMORY / f"npp_ds-{os.getuid()}"
    try:
        shared.mkdir(mode=0o700, exist_ok=True)
        status = shared.lstat()
    except OSError:
        return [home]
    return [shared, home] if shared.is_dir() and status.st_uid == os.getuid() and not shared.is_symlink() else [home]


def _choose_root(roots: list[Path], name: str, needed: int) -> Path:
    for root in roots[:-1]:
        if _usable_bytes(root, name) >= 2 * needed:
            return root
    if (usable := _usable_bytes(roots[-1], name)) < needed:
        raise UserError(
            f"{roots[-1]}: {usable:,} bytes free, {needed:,} needed to stage the set; "
            "free some space, or name a cache folder on a larger disk."
        )
    return roots[-1]


def _usable_bytes(root: Path, name: str) -> int:
    """Return the bytes that the set may take in `root`: the free ones and those of its interrupted download."""
    return shutil.disk_usage(nearest_folder(root)).free + _fetched_bytes(root, name)


def _fetched_bytes(root: Path, name: str) -> int:
    return sum(path.stat().st_size for path in _download(root / name).glob("*"))


def _download(folder: Path) -> Path:
    return folder.with_suffix(".download")


@contextlib.contextmanager
def _locked(root: Path, name: str, source: str) -> Iterator[None]:
    """Hold the lock of one set in `root`. Raises OSError if the file system offers no locks.

    If the process that held the lock meanwhile failed with a UserError while it read the same source, raises the same:
    that source is not read again.
    """
    with open_lock(root / f"{name}.lock") as file:
        status = os.fstat(file.fileno())
        check_owner(root / f"{name}.lock", status)
        before = status.st_mtime_ns
        lock(file)
        file.seek(0)
        where, _, problem = file.read().partition("\n")
        if problem and where == source and os.fstat(file.fileno()).st_mtime_ns != before:
            raise UserError(problem)
        file.truncate(0)
        try:
            yield
        except UserError as error:
            file.write(f"{source}\n{error}")
            file.flush()
            raise


def _remove_abandoned(root: Path, source: str, name: str) -> None:
    """Delete what killed processes of this user left in `root`, of every set whose lock no other process holds.

    These are incomplete arrays, and downloads of sets that are staged, or of an earlier content of `source`.
    """
    downloads = [
        folder
        for folder in _leftovers(root, ".download")
        if folder.stem != name and (read_source(folder) == source or folder.with_suffix("").exists())
    ]
    for leftover in (*_leftovers(root, ".tmp"), *downloads):
        if leftover.lstat().st_uid != os.geteuid():
            continue
        with open_lock(leftover.with_suffix(".lock")) as file:
            if lock(file, patience=0):
                shutil.rmtree(leftover, ignore_errors=True)


def _leftovers(root: Path, suffix: str) -> list[Path]:
    """Return the folders in `root` that are named by a fingerprint and `suffix`; others are none of ours."""
    return [path for path in root.glob(f"*{suffix}") if re.fullmatch("[0-9a-f]{64}", path.stem)]


def _fill(source: str, manifest: Manifest, folder: Path) -> None:
    """Stage the shards at `source` in `folder`; the caller holds the lock."""
    if not remote.is_remote(source):
        _unpack(Path(source), source, manifest, folder)
        return
    fetched = _download(folder)
    fetched.mkdir(mode=0o755, exist_ok=True)
    check_owner(fetched, fetched.lstat())
    fetched.chmod(0o755)
    describe(fetched, source, manifest)
    remote.download(source, manifest, fetched)
    try:
        _unpack(fetched, source, manifest, folder)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    shutil.rmtree(fetched)


def _unpack(shard_dir: Path, source: str, manifest: Manifest, folder: Path) -> None:
    """Write the arrays into a temporary folder, flush them to disk and rename it to `folder`."""
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    temporary.chmod(0o755)
    try:
        write_set(shard_dir, source, manifest, temporary)
        fsync_directory(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(folder.parent)
