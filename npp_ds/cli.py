"""The command line `npp`: thin calls into the rooms, and one place that turns errors into a line and an exit code.

Exit codes: 0 done, 2 something to mend (the text says what), 3 the loss or the gradients left the finite numbers.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from npp_ds.errors import UserError

app = typer.Typer(
    name="npp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunDirectory = Annotated[Path, typer.Argument(help="a run folder")]


def main() -> None:
    """Runs the command line and exits."""
    rank = os.environ.get("RANK", "0")
    try:
        app()
    except UserError as error:
        if rank == "0" or not error.on_all_ranks:
            print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@app.callback()
def _group() -> None:
    """Trains class-conditional autoregressive image models with Next Patch Prediction."""


@app.command()
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as schedule.epochs=100")] = None,
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe")] = None,
    config: Annotated[Path | None, typer.Option(help="a YAML file with the keys of a recipe")] = None,
) -> None:
    """Train a run, or go on with it; start several processes with torchrun -m npp_ds train ..."""
    from npp_ds.config_checks import load_config
    from npp_ds.training.launch import world_size_of_environment

    try:
        run = load_config(recipe, config, overrides or (), world_size_of_environment())
    except UserError as error:
        raise UserError(str(error), on_all_ranks=True) from error

    from npp_ds.training.engine import NonFiniteError
    from npp_ds.training.trainer import train as train_run

    try:
        train_run(run)
    except NonFiniteError as error:
        print(f"error: {error}; stopped before the weights changed", file=sys.stderr, flush=True)
        sys.exit(3)
