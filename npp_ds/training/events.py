"""The events of a run as metrics.jsonl holds them, one JSON object a line. Pure: no torch."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from npp_ds.config.schedule import Stage
from npp_ds.errors import UserError

Event = dict[str, Any]


def read_events(path: str | Path) -> list[Event]:
    """The events of a metrics.jsonl, sorted by step and within a step in file order; `step` counts optimizer steps
    done.

    A last line cut off by a kill is left out. Raises UserError for a missing file and for any other line that is no
    event.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the metrics of a run, as `npp train` writes them")
    lines = path.read_text().split("\n")
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line or "null")
            if event is not None:
                events.append({**event, "event": event["event"], "step": int(event["step"])})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}, line {number}: found {line[:60]!r}, expected an event as JSON") from None
    return sorted(events, key=lambda event: event["step"])


def of_kind(events: list[Event], kind: str, stage: int | None = None) -> list[Event]:
    """The events called `kind`, of one stage or of all."""
    return [e for e in events if e["event"] == kind and stage in (None, e.get("stage"))]


def entered_stages(events: list[Event]) -> list[Stage]:
    """The stages that have begun, as their own events describe them."""
    names = {f.name for f in fields(Stage)} - {"index", "start_step"}
    begun = {e["stage"]: e for e in of_kind(events, "stage")}
    return [
        Stage(index=index, start_step=e["step"], **{name: e[name] for name in names})
        for index, e in sorted(begun.items())
    ]
