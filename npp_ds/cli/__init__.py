"""The command line `npp`: thin calls into the other packages, a module per group of commands, and the entry point.

Modules import torch and matplotlib inside functions, so that `npp --help` stays fast.
"""

import sys
from typing import Annotated

import typer

from npp_ds import __version__
from npp_ds.cli import files, images, runs
from npp_ds.cli.exit_codes import exit_code_of
from npp_ds.distributed.environment import read_environment
from npp_ds.utils.screen import show_logs

app = typer.Typer(
    name="npp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    runs.train,
    runs.doctor,
    runs.plan,
    runs.status,
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
app.add_typer(runs.recipes, name="recipes")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"npp_ds {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and exit")
    ] = False,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", hidden=True)
    ] = None,  # the deepspeed launcher adds it
) -> None:
    """Train class-conditional autoregressive image models with Next Patch Prediction.

    Example: npp plan --recipe xl_256 --gpus 8
    """
    show_logs(read_environment().rank, to_stderr=True)


def main() -> None:
    """Run the command line and exit."""
    if any("pipe:" in word for word in sys.argv):
        from npp_ds.data.remote import allow_commands

        allow_commands(sys.argv[1:])
    sys.exit(exit_code_of(app))
