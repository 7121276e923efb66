"""The watchdog: it ends a run in which one rank makes no progress, and writes where every rank was."""

import faulthandler
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType

from npp_ds.utils.files import locked

STALLED = 4
"""Exit code of a process that has made no progress for too long."""

APPEND_WHAT_ARRIVES = 'trap "" TERM INT HUP; IFS= read -r line && { printf "%s\\n" "$line"; cat; } >> "$0"'
"""A shell program that appends its input to the file $0, opened at the first line."""


class Watchdog:
    """End this process when nothing has set `progress` for `seconds`, after writing the stacks of all its threads.

    All ranks wait for one that stalls, so all their watchdogs notice it within a tick. Each appends to the file at
    `path` and leaves the others time to do so before it ends. A process whose interpreter is locked, or that was
    suspended for longer than `seconds`, is ended by faulthandler's own thread: its stacks follow the line "Timeout" and
    its exit code is 1. A process has one such thread, so one watchdog at a time. The file exists only after a stall:
    faulthandler, which needs an open descriptor, writes to a shell that opens the file when something arrives.
    """

    def __init__(self, path: Path, rank: int, seconds: float):
        """Off when `seconds` is 0 or less."""
        self.path, self.rank, self.seconds = Path(path), rank, seconds
        self.tick = min(seconds / 16, 1.0)  # seconds between two checks
        self.slack = min(seconds / 4, 2.0)  # seconds by which faulthandler's timeout is later than ours
        # Seconds to wait for the stacks of ranks that notice later; more than tick + slack
        self.grace = min(seconds / 2, 10.0)
        self.progress = threading.Event()  # set by the run, cleared by the thread that watches
        self._patient = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._writer: subprocess.Popen[bytes] | None = None

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Never count the process as stalled inside the block: for slow work that cannot report progress."""
        self._patient = True
        try:
            yield
        finally:
            self.progress.set()
            self._patient = False

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            self._writer = subprocess.Popen(
                ["sh", "-c", APPEND_WHAT_ARRIVES, self.path.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                cwd=self.path.parent,
                start_new_session=True,  # so that Ctrl-C and a launcher's signals leave it alone; it ends with us
            )
            self._arm(self.seconds)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; a second call does nothing."""
        if self._thread is None:
            return
        self._closed.set()
        self._thread.join()
        self._thread = None
        faulthandler.cancel_dump_traceback_later()
        assert self._writer is not None
        self._writer.kill()
        self._writer.communicate()

    def _arm(self, seconds: float) -> None:
        assert self._writer is not None and self._writer.stdin is not None
        faulthandler.dump_traceback_later(seconds + self.slack, exit=True, file=self._writer.stdin)

    def _watch(self) -> None:
        quiet = 0.0
        while not self._closed.wait(self.tick):
            quiet += self.tick
            if self.progress.is_set() or self._patient:
                self.progress.clear()
                quiet = 0.0
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
