"""Which process makes which part of a work: each takes the next one that nobody holds, so none waits for another.

A claim is a lock on a file in the folder that all processes write to. The system lets go of it when its holder dies,
however it dies, so a claim is never lost and never stale.
"""

import errno
import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Claims:
    """The claims of one process; a context manager that lets go of them all.

    On a file system without locks the parts are dealt to the `world_size` processes in turn instead.
    """

    def __init__(self, folder: Path, rank: int, world_size: int):
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self._held: dict[int, TextIO] = {}

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_) -> None:
        for part in list(self._held):
            self.release(part)

    def take(self, count: int, finished: Callable[[int], bool]) -> Iterator[int]:
        """Claims the parts below `count` one by one until each is finished or in the hands of another process."""
        open_parts = list(range(count))
        while open_parts:
            taken = 0
            held_by_others = []
            for part in open_parts:
                if finished(part):
                    continue
                if not self._claim(part):
                    held_by_others.append(part)
                elif finished(part):  # while it was being claimed
                    self.release(part)
                else:
                    taken += 1
                    yield part
            if not taken:
                return
            open_parts = held_by_others

    def release(self, part: int) -> None:
        self._held.pop(part).close()

    def _claim(self, part: int) -> bool:
        file = open_lock(self.folder / f"{part:06d}.claim")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            mine = part % self.world_size == self.rank
        if mine:
            self._held[part] = file
        else:
            file.close()
        return mine


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of the file at `path`, after waiting for it; holds none where the file system has no locks."""
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def open_lock(path: Path) -> TextIO:
    """The lock file, made with its folder; the folder may be removed by a process that is done at this very moment."""
    for _ in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return path.open("a")
        except FileNotFoundError:
            continue
    return path.open("a")
