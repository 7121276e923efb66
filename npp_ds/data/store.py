"""Staging: a set of shards verified and unpacked once per node into one read-only array that all processes map.

The cache folder of a set is named by its manifest's fingerprint and appears by one rename under a lock: a folder that
is there is whole, whoever was killed while making it, and a changed manifest means another folder. Shards behind a URL
are fetched into a folder beside it first, which outlives an interruption and goes once they are unpacked.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npp_ds.data import remote
from npp_ds.data.shards import MANIFEST_NAME, Manifest, read_sound
from npp_ds.errors import UserError
from npp_ds.utils.files import fsync_directory, nearest_folder, write_text_atomic

SHARED_MEMORY = Path("/dev/shm")
_CODES, _LABELS, _SOURCE = "codes.npy", "labels.npy", "source.txt"


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
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> CodeStore:
    """The set in `shard_dir`, a folder or what `remote` takes, as arrays mapped from `cache_dir`, unpacked if need be.

    Environment variables in either path are filled in here, on the machine that reads it (`/local/$USER/train`).
    Any number of processes may call this at once: one fetches and unpacks (calling `progress(images done, images in
    all)`, and `say` when it fetches or when the shards have changed since they were staged), the others wait. Without
    `cache_dir` it is /dev/shm/npp_ds-<uid> when the set takes at most half of what is free there, else
    ~/.cache/npp_ds. UserError for a missing or bad set, an empty one, and a full disk.
    """
    shard_dir = here(shard_dir)
    manifest = load_manifest(shard_dir)
    name, source = manifest.fingerprint(), _source(shard_dir)
    needed = _bytes_needed(manifest, source)
    roots = _roots(cache_dir)
    if store := _open_first(roots, name, manifest):
        return store
    try:
        # Judged under the first root's lock: beside a process that is filling that root, it would look full.
        with _locked(roots[0], name):
            if store := _open_first(roots, name, manifest):
                return store
            root = _choose_root(roots, name, needed)
            with _locked(root, name) if root != roots[0] else contextlib.nullcontext():
                if store := _open_first(roots, name, manifest):
                    return store
                _say_what_changed(source, name, roots, say)
                for folder in roots:
                    _remove_abandoned(folder, source, name)
                _fill(source, manifest, root / name, progress, say)
    except OSError as error:
        raise UserError(
            f"{error.filename or roots[0]}: {error.strerror} while staging {shard_dir} ({needed:,} "
            "bytes); free some space, or name a cache folder on a local disk that is writable and large enough."
        ) from error
    store = _open(root / name, manifest)
    if store is None:
        raise UserError(f"{root / name}: removed or changed while it was being staged; run again.")
    return store


def load_manifest(shard_dir: str | Path) -> Manifest:
    """The manifest of a set in a folder or behind a URL, as `stage` takes them.

    UserError when there is no good one, or it is that of an empty set.
    """
    shard_dir = here(shard_dir)
    manifest = remote.load_manifest(shard_dir) if remote.is_remote(shard_dir) else Manifest.load(shard_dir)
    if manifest.num_samples == 0:
        raise UserError(f"{shard_dir}: holds no samples; expected at least one. Tokenize some images into it.")
    return manifest


def find_staged(manifest: Manifest, cache_dir: str | Path | None = None) -> CodeStore | None:
    """The set of this manifest where `stage` has unpacked it already."""
    return _open_first(_roots(cache_dir), manifest.fingerprint(), manifest)


def place_to_stage(shard_dir: str | Path, manifest: Manifest, cache_dir: str | Path | None = None) -> tuple[Path, int]:
    """The folder in which `stage` would unpack the set now, and the bytes that it would still write there.

    Those of an interrupted download are there already. Writes nothing.

    UserError when there is no room.
    """
    needed, name = _bytes_needed(manifest, _source(here(shard_dir))), manifest.fingerprint()
    root = _choose_root(_roots(cache_dir), name, needed)
    return root, needed - _fetched_bytes(root, name)


def manifest_at_hand(shard_dir: str | Path, cache_dir: str | Path | None = None) -> Manifest | None:
    """What `load_manifest` finds, yet without the network: in the folder, else in the copy staged last; or None."""
    shard_dir = here(shard_dir)
    if not remote.is_remote(shard_dir) and (Path(shard_dir) / MANIFEST_NAME).is_file():
        return Manifest.load(shard_dir)
    staged = _staged_from(_source(shard_dir), _roots(cache_dir))
    return Manifest.load(staged[-1]) if staged else None


def here(place: str | Path) -> str | Path:
    """`place` with the environment variables of this machine filled in; the shell of a pipe fills in its own."""
    return place if remote.is_remote(place) else os.path.expandvars(place)


def _source(shard_dir: str | Path) -> str:
    """One text for one place, whatever the working directory."""
    return shard_dir.rstrip("/") if remote.is_remote(shard_dir) else str(Path(shard_dir).resolve())


def _staged_from(source: str, roots: list[Path]) -> list[Path]:
    """The staged sets that came from `source`, the newest last; damaged ones may be among them."""
    folders = [path.parent for root in roots for path in root.glob(f"*/{_SOURCE}") if path.parent.suffix == ""]
    return sorted((folder for folder in folders if _read_source(folder) == source), key=os.path.getmtime)


def _read_source(folder: Path) -> str | None:
    try:
        return (folder / _SOURCE).read_text()
    except OSError:
        return None


def _say_what_changed(source: str, name: str, roots: list[Path], say: Callable[[str], None]) -> None:
    if earlier := [folder for folder in _staged_from(source, roots) if folder.name != name]:
        say(
            f"{source}: the shards have changed since they were staged in {earlier[-1]}; staging them anew. "
            "The earlier copy stays for runs that use it: remove it when none does."
        )


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


def _bytes_needed(manifest: Manifest, source: str) -> int:
    """The arrays, and the shards beside them until they are unpacked, if they are fetched."""
    fetched = sum(shard.bytes for shard in manifest.shards) if remote.is_remote(source) else 0
    return manifest.num_samples * (manifest.num_crops * manifest.num_tokens * 2 + 8) + fetched


def _roots(cache_dir: str | Path | None) -> list[Path]:
    return [Path(here(cache_dir))] if cache_dir is not None else _default_roots()


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


def _choose_root(roots: list[Path], name: str, needed: int) -> Path:
    for root in roots[:-1]:
        if _room(root, name) >= 2 * needed:
            return root
    if (room := _room(roots[-1], name)) < needed:
        raise UserError(
            f"{roots[-1]}: {room:,} bytes free, {needed:,} needed to stage the set; "
            "free some space, or name a cache folder on a larger disk."
        )
    return roots[-1]


def _room(root: Path, name: str) -> int:
    """Bytes that the set may take under `root`: what is free, and what an interrupted download of it takes already."""
    return shutil.disk_usage(nearest_folder(root)).free + _fetched_bytes(root, name)


def _fetched_bytes(root: Path, name: str) -> int:
    return sum(path.stat().st_size for path in _download(root / name).glob("*"))


def _download(folder: Path) -> Path:
    return folder.with_suffix(".download")


@contextlib.contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Holds the lock of one set under `root`; the kernel lets go of it when the process dies, however it dies.

    UserError when a holder's work ended in one while this process waited: the set would be read in vain once more.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("a+") as file:
        before = os.fstat(file.fileno()).st_mtime_ns
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if (problem := file.read()) and os.fstat(file.fileno()).st_mtime_ns != before:
            raise UserError(problem)
        file.truncate(0)
        try:
            yield
        except UserError as error:
            file.write(str(error))
            file.flush()
            raise


def _remove_abandoned(root: Path, source: str, name: str) -> None:
    """Deletes what killed processes left under `root`, of any set whose lock nobody else holds.

    That is half-written arrays, and downloads that are unpacked or of what `source` was before it became `name`.
    """
    downloads = [
        folder
        for folder in root.glob("*.download")
        if folder.stem != name and (_read_source(folder) == source or folder.with_suffix("").exists())
    ]
    for leftover in (*root.glob("*.tmp"), *downloads):
        with leftover.with_suffix(".lock").open("a") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)


def _fill(
    source: str, manifest: Manifest, folder: Path, progress: Callable[[int, int], None], say: Callable[[str], None]
) -> None:
    """Makes the staged set `folder` from the shards at `source`; the caller holds the lock."""
    if not remote.is_remote(source):
        _unpack(Path(source), source, manifest, folder, progress)
        return
    fetched = _download(folder)
    fetched.mkdir(exist_ok=True)
    _describe(fetched, source, manifest)
    remote.download(source, manifest, fetched, say)
    try:
        _unpack(fetched, source, manifest, folder, progress)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    shutil.rmtree(fetched)


def _describe(folder: Path, source: str, manifest: Manifest) -> None:
    manifest.save(folder)
    write_text_atomic(folder / _SOURCE, source)


def _unpack(
    shard_dir: Path, source: str, manifest: Manifest, folder: Path, progress: Callable[[int, int], None]
) -> None:
    """Writes the arrays beside `folder`, flushes them to disk and renames."""
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_arrays(shard_dir, manifest, temporary, progress)
        _describe(temporary, source, manifest)
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

        read_sound(shard_dir, manifest, accept, progress)
        np.save(labels_file, np.array(labels, np.int64))
        for file in (codes_file, labels_file):
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o444)
