"""A run in which one rank stands still ends, and says where every rank stood."""

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
"""Exit code of a process that has stood still for too long."""


class Watchdog:
    """Ends this process when nothing has called `beat` for `seconds`; writes the stacks of all its threads first.

    All ranks wait for one that stands still, so all their watchdogs find it out within a tick; each appends to the file
    at `path` and leaves the others time to do so before it ends. A process whose interpreter is locked by what holds it
    up, or that was suspended for longer than `seconds`, is ended by faulthandler's own thread: its stacks follow the
    line "Timeout" and its exit code is 1. There is one such thread per process, so one watchdog at a time.
    """

    def __init__(self, path: Path, rank: int, seconds: float):
        """Off when `seconds` is 0 or less."""
        self.path, self.rank, self.seconds = Path(path), rank, seconds
        self.tick = min(seconds / 16, 1.0)  # seconds between two looks
        self.slack = min(seconds / 4, 2.0)  # by which faulthandler's thread comes later than ours
        self.grace = min(seconds / 2, 10.0)  # more than tick and slack: for those who come later
        self._beaten = self._patient = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._descriptor = -1

    def beat(self) -> None:
        """Says that a step is done."""
        self._beaten = True

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, nobody is taken for stalled: for what takes its time and cannot tell its progress."""
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
        """Ends the watch and removes the file when no rank has written to it; a second call does nothing."""
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
            self._arm(self.seconds - quiet)  # at every look, for ours are counted and may drift from the clock

    def _end(self, quiet: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        last_resort = threading.Timer(2 * self.grace, os._exit, [STALLED])  # the file system may be what stands still
        last_resort.daemon = True
        last_resort.start()
        who = f"rank {self.rank}, host {socket.gethostname()}, pid {os.getpid()}: no step for {quiet:.0f} s"
        try:
            header = f"=== {datetime.now().astimezone().isoformat(timespec='seconds')}, {who}\n"
            text = header.encode() + _stacks() + b"\n"
            with locked(self.path, self.grace / 2), open(self.path, "ab", buffering=0) as file:
                file.write(text)  # under a lock, for appending is not atomic between nodes
            os.write(2, f"{who}; the stacks of all ranks are in {self.path}; ends with {STALLED}\n".encode())
        except OSError:
            faulthandler.dump_traceback(file=2, all_threads=True)
        time.sleep(self.grace)
        os._exit(STALLED)


def _stacks() -> bytes:
    """The stacks of all threads of this process, in one piece, so that ranks do not write in between each other."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
