"""Counts, durations, sizes and times as text, text from files made safe for a terminal, and tables of such texts."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def counted(number: int, noun: str) -> str:
    """Return `1 process`, `2 processes` or `1,200 images`; the plural is that of a regular noun."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch", "x")) else "s"
    return f"{number:,} {noun}{ending}"


def format_duration(seconds: float) -> str:
    """Return 12.3 s, 4:05 min, 2:02:05 or 3 days, 2:05:00."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    text = str(timedelta(seconds=round(seconds)))
    return f"{text.removeprefix('0:').lstrip('0')} min" if seconds < 3600 else text


def format_bytes(number: float) -> str:
    """Return 6.6 GB, 18.5 MB or 43.0 kB, of 1000 bytes each."""
    unit, size = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if abs(number) >= s or u == "kB")
    return f"{number / size:,.1f} {unit}"


def printable(text: str, keep: str = "") -> str:
    """Return `text` with every character that is invisible or controls a terminal as an escape such as \\x1b.

    Names in files may hold such characters. Those in `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def utc_now() -> str:
    """Return the time as 2026-01-31T12:00:00.000+00:00: texts of later times sort behind those of earlier ones."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def make_table(
    columns: Sequence[str],
    rows: Iterable[Sequence["str | Text"]],
    *,
    title: str | None = None,
    totals: Sequence[str] | None = None,
    justify: Literal["left", "right"] = "right",
) -> "Table":
    """Return a table for `rich.console.Console.print`; `totals` is a last row, set apart by a line.

    Cells that are no `plain_text` yet are made so.
    """
    from rich.table import Table

    table = Table(title=plain_text(title) if title else None, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(plain_text(cell) if isinstance(cell, str) else cell for cell in row))
    if totals is not None:
        table.add_section()
        table.add_row(*map(plain_text, totals), style="bold")
    return table


def plain_text(text: str, style: str = "") -> "Text":
    """Return text for rich in one style: its brackets are no markup, and control characters in it are escaped."""
    from rich.text import Text

    return Text(printable(text, keep="\n"), style)
