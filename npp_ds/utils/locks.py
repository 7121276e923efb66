"""File locks between processes: on one machine, and between nodes where the file system supports it.

`filelock` cannot replace this. On a file system without locks (ENOSYS) filelock 4.3 creates a marker file instead, and
a process that is killed leaves its marker behind, which processes on other nodes wait for without end. filelock 3.13
truncates the file that it locks, and two of ours have content: a run's stalled.txt and the lock of a staged set.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def lock(file: TextIO, patience: float | None = None) -> bool:
    """Lock an open file until it is closed. Return False if another process keeps the lock for `patience` seconds.

    Without `patience` it waits as long as it takes. The kernel releases the lock of a process that dies, however it
    dies. Raises OSError (ENOLCK, ENOSYS, EOPNOTSUPP) if the file system offers no locks.
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
