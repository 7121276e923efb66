"""The log of a run, metrics.jsonl (a JSON object with its step in each line), and its environment. Imports no torch."""

import json
import logging
import os
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


def read_events(path: str | Path, warn: bool = True) -> list[Event]:
    """Return the events of a metrics.jsonl, sorted by step and in file order within a step.

    `step` counts the optimizer steps done. A last line cut off by a kill is left out, and so is any other line that is
    no event, with a warning if `warn`. Raises UserError for a missing file, and for one above MOST_BYTES.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the metrics of a run, as `npp train` writes them")
    events, number = [], 0
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
            raise UserError(f"{path}: {size:,} bytes, expected at most {MOST_BYTES:,}; restore it or move it away")
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
    """A file of JSON lines, each with its step; when opened at step S it drops the lines of later steps.

    A line that cannot be written (a full disk) waits in memory and is written before the next one.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.kept: list[Event] = []
        self._waiting: list[bytes] = []  # whole lines; the first `_sent` bytes of the first one are in the file
        self._sent = 0
        self._descriptor = -1
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Drop what was written after `step` steps."""
        before = read_events(self.path) if self.path.is_file() else []
        before += [json.loads(line) for line in self._waiting]
        self.kept = [line for line in before if self.precedes(line, step)]
        write_text_atomic(self.path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self._waiting, self._sent = [], 0
        self.close()
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def precedes(self, line: Event, step: int) -> bool:
        """Return whether a run that resumes after `step` steps keeps this line, because it does not write it again."""
        return line["step"] <= step

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


class MetricsLog(StepLog):
    """The events of a run in metrics.jsonl."""

    def precedes(self, line: Event, step: int) -> bool:
        if line["event"] == "end":
            return False
        return line["step"] < step or (line["step"] == step and line["event"] != "stage")

    @property
    def elapsed_before(self) -> float:
        """Return the seconds of training in the kept lines."""
        return max((line.get("elapsed_seconds", 0.0) for line in self.kept), default=0.0)
