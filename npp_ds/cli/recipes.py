"""Commands about the shipped recipes: list them, show one."""

from pathlib import Path
from typing import Annotated

import typer

from npp_ds.cli.common import complete_recipe

recipes = typer.Typer(invoke_without_command=True)


@recipes.callback()
def list_(context: typer.Context) -> None:
    """List the shipped recipes: parameters, patch sides, epochs, and what each is for.

    Example: npp recipes
    """
    if context.invoked_subcommand:
        return
    from npp_ds.config.load import load_config, recipe_names
    from npp_ds.config.schema import RECIPES

    for name in recipe_names():
        config = load_config(name)
        stages = config.stage_table()
        sides = ",".join(str(stage.patch_side) for stage in stages)
        epochs = sum(stage.epochs or 0 for stage in stages)
        parameters = config.model.parameters() / 1e6
        about = _about(RECIPES / f"{name}.yaml")
        print(f"{name:<11} {parameters:>6,.{1 if parameters < 10 else 0}f}M  {sides:<7} {epochs:>3g} epochs  {about}")


def _about(file: Path) -> str:
    """Return the comment in the first line of a recipe's file, else what it changes of the recipe that it extends."""
    import yaml

    text = file.read_text()
    if text.startswith("#"):
        return text.partition("\n")[0].removeprefix("#").strip().rstrip(".")
    keys = yaml.safe_load(text)
    base = keys.pop("extends")
    changes = [
        f"{section}.{key}={value}" for section, of in keys.items() if section != "name" for key, value in of.items()
    ]
    return f"{base} with {' '.join(changes)}"


@recipes.command()
def show(name: Annotated[str, typer.Argument(autocompletion=complete_recipe, help="a shipped recipe")]) -> None:
    """Print every key of a recipe as YAML, which a file for --config can start from.

    Example: npp recipes show xl_256
    """
    from npp_ds.config.load import load_config

    print(load_config(name).to_yaml(), end="")
