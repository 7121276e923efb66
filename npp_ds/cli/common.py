"""What several commands share: options and warnings."""

import sys
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
