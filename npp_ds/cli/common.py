"""What several commands share: options, warnings, progress."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

RunDirectory = Annotated[Path, typer.Argument(help="a run folder")]
Heads = Annotated[
    int | None,
    typer.Option(min=1, help="attention heads of a published checkpoint; dim / 64 when the file does not tell"),
]
GridSize = Annotated[
    int | None,
    typer.Option(min=1, help="side of a published checkpoint's code map: 16 at 256 px (when left out), 24 at 384 px"),
]


def warn(text: str | None) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(what: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that draws a bar on a terminal and prints a line now and then elsewhere."""
    if not shown:
        yield lambda done, total: None
    elif not sys.stderr.isatty():
        yield progress_lines(what)
    else:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_lines(what: str, seconds_between: float = 30.0) -> Callable[[int, int], None]:
    printed = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > seconds_between:
            printed = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return show
