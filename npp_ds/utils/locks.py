"""A lock between processes for the file systems that have one; nothing here may hang on those that do not."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, patience: float) -> Iterator[bool]:
    """Holds flock on the file at `path`, created when absent; yields whether the lock was had.

    Not had where the file system offers no locks, or when another process (one that was suspended, say) keeps it for
    more than `patience` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _flock(descriptor, patience)
    finally:
        os.close(descriptor)  # which also unlocks


def _flock(descriptor: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        except OSError:
            return False
