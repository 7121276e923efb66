"""The progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from npp_ds.utils.format import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_BARS = 10.0, 0.1
Item = TypeVar("Item")


class Progress:
    """A context manager; call it with (done, total) as the work proceeds. It writes to standard error.

    Rate and time left count from the first call, so they leave out work that an earlier start did. Processes other than
    the first one set `shown` to False.
    """

    def __init__(self, what: str, shown: bool = True, unit: str = "images"):
        self.what, self.shown, self.unit = what, shown, unit
        self._bar: Bar | None = None
        self._pause = SECONDS_BETWEEN_LINES
        self._last = time.monotonic()
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> "Progress":
        if self.shown and sys.stderr.isatty():
            self._bar, self._pause = _bar(self.what), SECONDS_BETWEEN_BARS
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int, facts: str = "") -> None:
        """Show that `done` of `total` units are done, with the rate, other `facts` and the time left."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        if not self.shown or now - self._last < self._pause:
            return
        self._last = now
        parts = [self.unit, facts]
        if done > self._first[0]:
            rate = (done - self._first[0]) / max(now - self._first[1], 1e-9)
            parts = [
                self.unit,
                f"{rate:.3g} {self.unit}/s",
                facts,
                f"{format_duration(max(total - done, 0) / rate)} left",
            ]
        text = ", ".join(filter(None, parts))
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=text)
        else:
            with suppress(OSError):  # a full disk or a closed pipe under the screen stops no work
                print(f"{self.what}: {done}/{total} {text}", file=sys.stderr, flush=True)


def _bar(what: str) -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn(what), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=None, text="")
    return bar


def track(items: Iterable[Item], what: str, total: int, shown: bool = True) -> Iterator[Item]:
    """Yield the items and show how many of `total` there have been."""
    with Progress(what, shown) as progress:
        progress(0, total)
        for done, item in enumerate(items, start=1):
            yield item
            progress(done, total)
