"""Options and warnings that several commands share."""

import logging
from pathlib import Path
from typing import Annotated

import typer

logger = logging.getLogger(__name__)


def complete_recipe(incomplete: str) -> list[str]:
    from npp_ds.config.load import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """Return the keys of the config that begin with what was typed, as `model.dim=`."""
    from npp_ds.config.fields import keys_of, section_of
    from npp_ds.config.schema import RunConfig

    keys = [key for key, field in keys_of(RunConfig) if section_of(field.annotation) is not field.annotation]
    return [f"{key}=" for key in keys if key.startswith(incomplete) and ".N." not in key]


Recipe = Annotated[str | None, typer.Option(autocompletion=complete_recipe, help="a shipped recipe")]
ConfigFile = Annotated[Path | None, typer.Option(help="a YAML file with the keys of a recipe")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(autocompletion=complete_key, help="key=value, such as optimizer.learning_rate=2e-4"),
]
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
