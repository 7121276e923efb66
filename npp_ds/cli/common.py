"""Options, warnings and progress that several commands share."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str | None, typer.Option(help="a shipped recipe")]
ConfigFile = Annotated[Path | None, typer.Option(help="a YAML file with the keys of a recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as optimizer.learning_rate=2e-4")]
WeightsKind = Annotated[str, typer.Option(help="raw, or ema: their moving average")]
Heads = Annotated[
    int | None,
    typer.Option(min=1, help="attention heads of a published checkpoint; default: dim / 64, if the file lacks them"),
]
GridSize = Annotated[
    int | None,
    typer.Option(min=1, help="side of a published checkpoint's code map: 16 at 256 px (the default), 24 at 384 px"),
]


def warn(text: str | None) -> None:
    """Print a warning, if there is one, on standard error."""
    if text:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(what: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that draws a bar on a terminal and prints a line every 30 s elsewhere."""
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
    """Return a callback (done, total) that prints at most one line every `seconds_between` seconds."""
    printed = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > seconds_between:
            printed = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return show
