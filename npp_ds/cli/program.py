"""All commands of `npp`, and the entry point. `exit_codes.py` lists the exit codes."""

import sys
from typing import Annotated

import typer

from npp_ds.cli import files, images, runs
from npp_ds.cli.exit_codes import exit_code_of

app = typer.Typer(
    name="npp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    runs.train,
    runs.doctor,
    runs.plan,
    runs.report,
    images.sample,
    images.demo,
    images.evaluate,
    images.likelihood,
    files.export,
):
    app.command()(command)
app.command("import")(files.import_)
app.add_typer(files.shards, name="shards")


@app.callback()
def _group(
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", hidden=True)
    ] = None,  # the deepspeed launcher adds it
) -> None:
    """Train class-conditional autoregressive image models with Next Patch Prediction."""


def main() -> None:
    """Run the command line and exit."""
    sys.exit(exit_code_of(app))
