"""Counts, durations, sizes and times as text, and text from files made safe for a terminal."""

from datetime import datetime, timedelta, timezone


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
