"""A queue of numbered parts that processes share through a folder: each takes the next free one, and none waits.

A process takes a part by locking a file in the folder. The kernel releases the lock when the process dies, so a dead
process holds no part.
"""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from npp_ds.utils.files import lock, open_lock

WORK_FOLDER, SETTINGS_FILE, LOCK_FILE = ".unfinished", "settings.json", "lock"
"""Names for resumable work: the folder of its queue, in it the settings of the work and a lock."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class WorkQueue:
    """The parts that this process has taken; a context manager that releases them all.

    On a file system without locks the parts go to the `world_size` processes in turn instead.
    """

    def __init__(self, folder: Path, rank: int, world_size: int):
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self._taken: dict[int, TextIO] = {}

    def __enter__(self) -> "WorkQueue":
        return self

    def __exit__(self, *_: object) -> None:
        for part in list(self._taken):
            self.release(part)

    def take(self, count: int, finished: Callable[[int], bool]) -> Iterator[int]:
        """Yield parts below `count`, each taken for this process, until all are finished or taken by others."""
        open_parts = list(range(count))
        while open_parts:
            taken = 0
            taken_by_others = []
            for part in open_parts:
                if finished(part):
                    continue
                if not self._take(part):
                    taken_by_others.append(part)
                elif finished(part):  # by another process, just before this one locked it
                    self.release(part)
                else:
                    taken += 1
                    yield part
            if not taken:
                return
            open_parts = taken_by_others

    def release(self, part: int) -> None:
        """Give a taken part back; if it is not finished, any process can take it again."""
        self._taken.pop(part).close()

    def _take(self, part: int) -> bool:
        file = open_lock(self.folder / f"{part:06d}.claim")
        try:
            mine = lock(file, patience=0)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            mine = part % self.world_size == self.rank
        if mine:
            self._taken[part] = file
        else:
            file.close()
        return mine
