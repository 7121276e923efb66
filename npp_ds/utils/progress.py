"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere, nothing from other processes."""

import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Count:
    """How far the set is: images and shards done by all processes, and images skipped among them."""

    images: int
    shards: int
    skipped: int


class Progress:
    """Context manager; `show(count)` after each batch. `crops` per image only changes what is shown."""

    def __init__(self, total: Count, before: Count, crops: int, shown: bool = True, seconds_between_lines: float = 5.0):
        self.total, self.before, self.crops, self.shown = total, before, crops, shown
        self.pause = seconds_between_lines
        self.bar = None

    def __enter__(self) -> "Progress":
        self.started = self.printed = time.monotonic()
        if self.shown and sys.stderr.isatty():
            self.bar, self.task = _bar(self.total.images, self.before.images)
            self.bar.start()
        return self

    def show(self, count: Count) -> None:
        if self.bar:
            self.bar.update(self.task, completed=count.images, facts=self.facts(count))
        elif self.shown and time.monotonic() - self.printed > self.pause:
            self.printed = time.monotonic()
            print(f"{count.images}/{self.total.images} images, {self.facts(count)}", file=sys.stderr, flush=True)

    def facts(self, count: Count) -> str:
        rate = (count.images - self.before.images) / max(time.monotonic() - self.started, 1e-9)
        left = duration((self.total.images - count.images) / rate) if rate > 0 else "?"
        return (
            f"{rate:.3g} images/s, {rate * self.crops:.3g} crops/s, {count.shards}/{self.total.shards} shards, "
            f"{count.skipped} skipped, {left} left"
        )

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()


def duration(seconds: float) -> str:
    """12 s, 4:05 min or 13.2 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def size_against(stored: int, images: int | None) -> str:
    """Size of the shards, and beside it that of the `images` they were made of where it is known."""
    if not images or not stored:
        return readable_bytes(stored)
    times = f"{images / stored:.1f} times less" if images > stored else f"{stored / images:.1f} times more"
    return f"{readable_bytes(stored)}, {times} than the images' {readable_bytes(images)}"


def readable_bytes(number: int) -> str:
    """6.6 GB, 18.5 MB or 43.0 kB."""
    unit, size = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if number >= s or u == "kB")
    return f"{number / size:,.1f} {unit}"


def _bar(total: int, completed: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
    bar = Bar(*columns, console=Console(stderr=True))
    return bar, bar.add_task("", total=total, completed=completed, facts="")
