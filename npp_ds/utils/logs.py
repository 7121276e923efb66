"""What people read on the screen: lines of text, and the log records of the first process."""

import logging
import sys
from contextlib import suppress
from typing import TextIO

from npp_ds.utils.format import printable

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
