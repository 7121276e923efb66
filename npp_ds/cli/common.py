"""Options and warnings that several commands share."""

import logging
from pathlib import Path
from typing import Annotated

import typer

logger = logging.getLogger(__name__)

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
    """Log a warning, if there is one."""
    if text:
        logger.warning(text)
