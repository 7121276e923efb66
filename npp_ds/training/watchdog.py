"""The watchdog: it ends a run in which one rank makes no progress, and writes where every rank was."""

import faulthandler
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

from npp_ds.utils.locks import locked

STALLED = 4
"""Exit code of a process that has made no progress for too long."""


class Watchdog:
    """End this process when nothing has called `beat` for `seconds`, after writing the stacks of all its threads.

    All ranks wait for one that stalls, so all their watchdogs notice it within a tick. Each appends to the file at
    `path` and leaves the others time to do so before it ends. A process whose interpreter is locked, or that was
    suspended for longer than `seconds`, is ended by faulthandler's own thread: its stacks follow the line "Timeout" and
    its exit code is 1. A process has one such thread, so one watchdog at a time.
    """

    def __init__(self, path: Path, rank: int, seconds: float):
        """Off when `seconds` is 0 or less."""
        self.path, self.rank, self.seconds = Path(path), rank, seconds
        self.tick = min(seconds / 16, 1.0)  # seconds between two checks
        self.slack = min(seconds / 4, 2.0)  # by which faulthandler's thread comes later than ours
        self.grace = min(seconds / 2, 10.0)  # more than tick and slack: for ranks that notice later
        self._beaten = self._patient = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._descriptor = -1

    def beat(self) -> None:
        """Report progress."""
        self._beaten = True

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Never count the process as stalled inside the block: for slow work that cannot report progress."""
        self._patient = True
        try:
            yield
        finally:
            self._beaten, self._patient = True, False

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            self._arm(self.seconds)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching and remove the file when no rank has written to it; a second call does nothing."""
        if self._thread is None:
            return
        self._closed.set()
        self._thread.join()
        self._thread = None
        faulthandler.cancel_dump_traceback_later()
        os.close(self._descriptor)
        with suppress(OSError):  # another rank removes it as well
            if self.path.stat().st_size == 0:
                self.path.unlink()

    def _arm(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds + self.slack, exit=True, file=self._descriptor)

    def _watch(self) -> None:
        quiet = 0.0
        while not self._closed.wait(self.tick):
            quiet += self.tick
            if self._beaten or self._patient:
                self._beaten, quiet = False, 0.0
            if quiet >= self.seconds:
                self._end(quiet)
            self._arm(self.seconds - quiet)  # every tick: ticks are counted and may drift from the clock

    def _end(self, quiet: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        last_resort = threading.Timer(2 * self.grace, os._exit, [STALLED])  # the file system may be what stalls
        last_resort.daemon = True
        last_resort.start()
        who = f"rank {self.rank}, host {socket.gethostname()}, pid {os.getpid()}: no step for {quiet:.0f} s"
        try:
            header = f"=== {datetime.now().astimezone().isoformat(timespec='seconds')}, {who}\n"
            text = header.encode() + _stacks() + b"\n"
            with locked(self.path, self.grace / 2), open(self.path, "ab", buffering=0) as file:
                file.write(text)  # under a lock: appending is not atomic between nodes
            os.write(2, f"{who}; the stacks of all ranks are in {self.path}; ends with {STALLED}\n".encode())
        except OSError:
            faulthandler.dump_traceback(file=2, all_threads=True)
        time.sleep(self.grace)
        os._exit(STALLED)


def _stacks() -> bytes:
    """Return the stacks of all threads of this process in one piece, so that ranks do not mix their lines."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
