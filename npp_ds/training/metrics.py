"""The log of a run, metrics.jsonl (a JSON object with its step in each line), and its environment. Imports no torch."""

import json
import logging
import os
import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from npp_ds.config.schedule import Stage
from npp_ds.errors import UserError
from npp_ds.utils.files import open_regular, parse_json, write_text_atomic

logger = logging.getLogger(__name__)

Event = dict[str, Any]
MOST_BYTES, MOST_BYTES_OF_A_LINE = 1 << 30, 1 << 20


def read_events(path: str | Path, warn: bool = True, most_bytes: int | None = MOST_BYTES) -> list[Event]:
    """Return the events of a metrics.jsonl, sorted by step and in file order within a step.

    `step` counts the optimizer steps done. A last line cut off by a kill is left out, and so is any other line that is
    no event, with a warning if `warn`. Raises UserError for a missing file, and for one above `most_bytes`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the metrics of a run, as `npp train` writes them")
    events, number = [], 0
    with open_regular(path) as file:
        if most_bytes is not None and (size := os.fstat(file.fileno()).st_size) > most_bytes:
            raise UserError(f"{path}: {size:,} bytes, expected at most {most_bytes:,}; restore it or move it away")
        while line := file.readline(MOST_BYTES_OF_A_LINE):
            number += 1
            try:
                event = parse_json(line.strip() or b"null")
                if event is not None:
                    events.append({**event, "event": event["event"], "step": int(event["step"])})
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                if warn and (line.endswith(b"\n") or len(line) == MOST_BYTES_OF_A_LINE):
                    logger.warning(f"{path}, line {number}: not an event as JSON: {line[:60]!r}; left out")
            while line and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = file.readline(MOST_BYTES_OF_A_LINE)
    return sorted(events, key=lambda event: event["step"])


def events_named(events: list[Event], name: str, stage: int | None = None) -> list[Event]:
    """Return the events of this name, of one stage or of all."""
    return [e for e in events if e["event"] == name and stage in (None, e.get("stage"))]


def stages_begun(events: list[Event]) -> list[Stage]:
    """Return the stages that have begun, as their own events describe them; a later key has its default."""
    names = {f.name for f in fields(Stage)} - {"index", "start_step"}
    begun = {e["stage"]: e for e in events_named(events, "stage")}
    return [
        Stage(index=index, start_step=e["step"], **{name: e[name] for name in names & e.keys()})
        for index, e in sorted(begun.items())
    ]


class StepLog:
    """A file of JSON lines, each with its step, in their order; when opened at step S it drops those of later steps.

    A line that cannot be written (a full disk) waits in memory and is written before the next one.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self._waiting: list[bytes] = []  # whole lines; the first `_sent` bytes of the first one are in the file
        self._sent = 0
        self._descriptor = -1
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Drop what was written after `step` steps."""
        lines, self._waiting, self._sent = self._waiting, [], 0
        self.close()
        self._waiting = self._drop_later_than(step, lines)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._flush()

    def _drop_later_than(self, step: int, waiting: list[bytes]) -> list[bytes]:
        """Cut the file before the first line of a later step, or one that a kill cut off; return who still waits.

        It is read line by line: all sample ids of a long run may be more than fits in memory.
        """
        if self.path.is_file():
            with self.path.open("r+b") as file:
                end = 0
                while (line := file.readline()).endswith(b"\n") and _step_of(line) <= step:
                    end += len(line)
                file.truncate(end)
        return [line for line in waiting if _step_of(line) <= step]

    def write(self, event: str, step: int, **values: Any) -> None:
        """Write one line: what happened after `step` optimizer steps."""
        self._waiting.append((json.dumps({"event": event, "step": step, **values}) + "\n").encode())
        self._flush()

    def sync(self) -> None:
        """Make what is written survive a power cut."""
        self._flush()
        with suppress(OSError):
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            self._flush()
            os.close(self._descriptor)
            self._descriptor = -1

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._sent += os.write(self._descriptor, self._waiting[0][self._sent :])
                if self._sent == len(self._waiting[0]):
                    self._waiting.pop(0)
                    self._sent = 0
        except OSError as error:
            logger.warning(f"{self.path}: {error.strerror}; lines wait in memory")


_STEP = re.compile(rb'\{"event": "\w+", "step": (\d+)')


def _step_of(line: bytes) -> int:
    """Return the step of a line; a damaged one belongs to any."""
    found = _STEP.match(line)
    return int(found[1]) if found else 0


class MetricsLog(StepLog):
    """The events of a run in metrics.jsonl; `kept` are those of before the step at which it was opened."""

    def _drop_later_than(self, step: int, waiting: list[bytes]) -> list[bytes]:
        before = read_events(self.path, most_bytes=None) if self.path.is_file() else []
        before += map(json.loads, waiting)
        self.kept = [line for line in before if self._precedes(line, step)]
        write_text_atomic(self.path, "".join(json.dumps(line) + "\n" for line in self.kept))
        return []

    def _precedes(self, line: Event, step: int) -> bool:
        """Return whether a run that resumes after `step` steps keeps this line, because it does not write it again."""
        if line["event"] == "end":
            return False
        return line["step"] < step or (line["step"] == step and line["event"] not in ("stage", "nonfinite"))

    @property
    def elapsed_before(self) -> float:
        """Return the seconds of training in the kept lines."""
        return max((line.get("elapsed_seconds", 0.0) for line in self.kept), default=0.0)
