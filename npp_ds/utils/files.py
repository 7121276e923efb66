"""Files that are complete or absent, whatever interrupts the writer, their hashes, and locks between processes."""

import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from npp_ds.errors import UserError

SMALL_FILE_BYTES = 64 << 20  # limit for files that are read whole, such as manifests and configs
TAR_HEADER_BYTES = 1 << 20  # limit for all headers of a member


def fsync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest_folder(path: str | Path) -> Path:
    """Return `path` or its nearest parent that is a folder: its disk is the one that would hold `path`."""
    path = Path(path).absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def open_regular(path: str | Path, flags: int = 0) -> BinaryIO:
    """Open a regular file for reading; `flags` are added to those of `os.open`.

    Raises OSError, as `open` does, and also for a FIFO, a socket or a device, of which nothing is read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | flags)
    try:
        if stat.S_ISDIR(mode := os.fstat(descriptor).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_small(path: str | Path, limit: int = SMALL_FILE_BYTES) -> bytes:
    """Return the content of a regular file. Raises OSError as `open_regular` does, and if it exceeds `limit` bytes."""
    content = b""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        while max(size, len(content)) <= limit and (block := file.read(size or 1 << 16)):
            content += block
    if max(size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"Larger than the {limit:,} bytes that such a file may have", str(path))
    return content


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file. Raises OSError as `read_small` does, ValueError as `parse_json` does."""
    return parse_json(read_small(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file that is only for people; {} if it is missing, unreadable or damaged."""
    with suppress(OSError, ValueError):
        found = read_json(path)
        return found if isinstance(found, dict) else {}
    return {}


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text. Raises ValueError for anything else, deep nesting, and 1e400."""
    try:
        return json.loads(content, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"number {text[:32]} out of range")
    return number


def plain_name(name: str) -> str:
    """Return `name` if it is that of a file in a folder: printable, without separators, 1 to 255 bytes.

    Raises ValueError for any other text, such as "../x". Names from files must pass this before they enter a path.
    """
    bad = name in (".", "..") or {"/", "\\"} & set(name) or not name.isprintable()
    if bad or not 0 < len(name.encode()) <= 255:
        raise ValueError("expected a plain file name: printable, at most 255 bytes, without '/' and '\\'")
    return name


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; when the block ends, flush it to disk and rename it to `path`.

    If the block raises (a full disk, an interrupt), the temporary file is removed and `path` stays as it was. Errors
    of the system name `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the first error counts
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)
        raise
    fsync_directory(path.parent)


def write_atomic(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace the file at `path` by what `write(file)` writes, as `atomic_file` does."""
    with atomic_file(path) as file:
        write(file)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Replace the file at `path` by `value` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def explain_os_errors(path: str | Path, advice: str = "free some space, or name another path") -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names its file, else `path`, and ends with `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}; {advice}") from error


def check_writable(path: str | Path) -> Path:
    """Make the folder of a result and check that it takes files, before hours of work. Return `path`.

    Raises UserError if nothing can be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected the name of a file")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    return path


class _Headers:
    """A file as `tarfile` sees it: at most `left` more bytes are read. tarfile itself reads any size that it finds."""

    left = 0

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError("a member's header is too long")
        return self.file.read(size)


@contextmanager
def _as_tar_errors() -> Iterator[None]:
    """Turn what `tarfile` (Python 3.10 to 3.13) raises for bad headers into tarfile.ReadError."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError, TypeError, LookupError) as error:
        raise tarfile.ReadError(f"bad header ({type(error).__name__})") from None


def tar_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of the archive that begins at the file's position. Raises tarfile.ReadError for damage.

    `tarfile` alone takes a damaged header for the end of the archive, goes back in the file if a size is negative, and
    reads headers of any length.
    """
    headers = _Headers(file)
    headers.left = TAR_HEADER_BYTES
    with _as_tar_errors():
        tar = tarfile.open(fileobj=headers, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
    while True:
        headers.left = TAR_HEADER_BYTES
        with _as_tar_errors():
            member = tar.next()
        if member is None:
            break
        tar.members = []  # do not keep them
        if member.size < 0 or tar.offset <= member.offset:
            raise tarfile.ReadError("a member's size is negative")
        yield member
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end-of-archive mark is missing")


def lock(file: TextIO, patience: float | None = None) -> bool:
    """Lock an open file until it is closed. Return False if another process keeps the lock for `patience` seconds.

    Without `patience` it waits as long as it takes. The kernel releases the lock of a process that dies, however it
    dies. Locks hold on one machine, and between nodes where the file system supports it. docs/architecture.md says why
    filelock cannot replace this. Raises OSError (ENOLCK, ENOSYS, EOPNOTSUPP) if the file system offers no locks.
    """
    if patience is None:
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)


@contextmanager
def locked(path: Path, patience: float | None = None, create_folder: bool = False) -> Iterator[bool]:
    """Hold the lock of the file at `path`, creating it if absent; yield whether it is held.

    It is not held if the file system offers no locks, or if another process (for example a suspended one) keeps it for
    more than `patience` seconds. Raises OSError if the folder is absent and `create_folder` is not set.
    """
    with open_lock(path) if create_folder else _open(path) as file:
        try:
            held = lock(file, patience)
        except OSError:
            held = False
        yield held


def open_lock(path: Path) -> TextIO:
    """Open a lock file for reading and appending, creating it and its folder if absent.

    Another process that has finished may remove the folder at any moment; then it is created again. Raises OSError for
    a link, a FIFO or a device of that name: in a shared folder a link could point to any file of this user.
    """
    for _ in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _open(path)
        except FileNotFoundError:
            continue
    return _open(path)


def _open(path: Path) -> TextIO:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags, 0o666), "a+")
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return file
    file.close()
    raise OSError(errno.EINVAL, "Not a plain file, as a lock must be", str(path))
