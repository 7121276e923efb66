"""What people read on the screen: lines of text, log records of the first process, and the progress of long work."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO, TypeVar

from npp_ds.utils.format import format_duration, printable

if TYPE_CHECKING:
    from rich.table import Table

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_BARS = 10.0, 0.1
NARROWEST_BAR, WIDEST_BAR = 8, 40
Item = TypeVar("Item")
Facts = Sequence[tuple[int, str]]
"""(rank, text) in the order of display; where space is short, those of higher rank are left out first."""


def fitted(facts: Facts, width: int | None = None) -> str:
    """Return the facts side by side, as many of them as fit in `width` columns; all without a width."""
    kept = list(facts)
    while width is not None and len(kept) > 1 and len("  ".join(text for _, text in kept)) > width:
        kept.remove(max(kept))
    return "  ".join(text for _, text in kept)[:width]


class LiveLine:
    """A bar and facts in the last line of a terminal, which must be one; what is printed meanwhile stands above it."""

    def __init__(self, stderr: bool = False):
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=stderr)
        self._share: float = 0.0
        self._facts: Facts = ()
        self._live = Live(console=self._console, auto_refresh=False, transient=True, get_renderable=self._line)
        self._live.start()

    @property
    def width(self) -> int:
        """The number of columns, which may change."""
        return self._console.width

    def show(self, share: float, facts: Facts) -> None:
        """Show that this share of the work is done."""
        self._share, self._facts = share, facts
        self._live.refresh()

    def close(self) -> None:
        self._live.stop()

    def _line(self) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        text, grid = fitted(self._facts, self.width), Table.grid(padding=(0, 1))
        bar = min(self.width - len(text) - 1, WIDEST_BAR)
        drawn = [ProgressBar(1.0, self._share, width=bar)] if bar >= NARROWEST_BAR else []
        grid.add_row(*drawn, Text(text, no_wrap=True))
        return grid


class Progress:
    """A context manager; call it with (done, total) as the work proceeds. It writes to standard error.

    Rate and time left count from the first call, so they leave out work that an earlier start did. Processes other than
    the first one set `shown` to False.
    """

    def __init__(self, what: str, shown: bool = True):
        self.what, self.shown = what, shown
        self._live: LiveLine | None = None
        self._pause = SECONDS_BETWEEN_LINES
        self._last = time.monotonic()
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> "Progress":
        if self.shown and sys.stderr.isatty():
            self._live, self._pause = LiveLine(stderr=True), SECONDS_BETWEEN_BARS
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.close()

    def __call__(self, done: int, total: int, facts: str = "") -> None:
        """Show that `done` of `total` images are done, with the rate, other `facts` and the time left."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        if not self.shown or now - self._last < self._pause:
            return
        self._last = now
        rate = left = ""
        if done > self._first[0]:
            per_second = (done - self._first[0]) / max(now - self._first[1], 1e-9)
            rate = f"{per_second:.3g} images/s"
            left = f"{format_duration(max(total - done, 0) / per_second)} left"
        if self._live:
            shown = [(1, self.what), (2, f"{done}/{total} images"), (3, rate), (4, facts), (0, left)]
            self._live.show(done / max(total, 1), [fact for fact in shown if fact[1]])
        else:
            text = ", ".join(filter(None, ["images", rate, facts, left]))
            with suppress(OSError):  # a full disk or a closed pipe under the screen stops no work
                print(f"{self.what}: {done}/{total} {text}", file=sys.stderr, flush=True)


def track(items: Iterable[Item], what: str, total: int, shown: bool = True) -> Iterator[Item]:
    """Yield the items and show how many of `total` there have been."""
    with Progress(what, shown) as progress:
        progress(0, total)
        for done, item in enumerate(items, start=1):
            yield item
            progress(done, total)


ANY_RANK = {"any_rank": True}
"""`extra` of a record that other processes show, too: of work that any one process does for the others."""


def say(*lines: str, to_stderr: bool = False) -> None:
    """Print lines for people. Characters of names that would control the terminal or break a line are escaped."""
    print("\n".join(map(printable, lines)), file=sys.stderr if to_stderr else sys.stdout, flush=True)


class ScreenHandler(logging.Handler):
    """Print each record as a plain line, warnings with a prefix; a screen behind a full disk loses them."""

    def __init__(self, to_stderr: bool):
        super().__init__(logging.INFO)
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        stream: TextIO = sys.stderr if self.to_stderr else sys.stdout  # looked up now: a progress bar may replace it
        prefix = "WARNING: " if record.levelno >= logging.WARNING else ""
        with suppress(OSError):
            print(prefix + printable(record.getMessage(), keep="\n"), file=stream, flush=True)


def show_logs(rank: int = 0, to_stderr: bool = False) -> None:
    """Show records of level INFO and above on the first process's screen; the others show those of ANY_RANK only."""
    handler = ScreenHandler(to_stderr)
    if rank:
        handler.addFilter(lambda record: getattr(record, "any_rank", False))
    logger = logging.getLogger("npp_ds")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
