"""Commands for runs: train, doctor, plan, status, report; and for the recipes that they start from."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from npp_ds.cli.common import ConfigFile, Overrides, Recipe, complete_recipe, warn
from npp_ds.cli.exit_codes import NON_FINITE, USER_ERROR, exit_now, print_error
from npp_ds.distributed.environment import read_environment
from npp_ds.errors import UserError, content_of, memory_advice
from npp_ds.training.preemption import PREEMPTED, Preempted, StopRequests
from npp_ds.utils.gpu_specs import GPUS


def train(
    overrides: Overrides = None,
    recipe: Recipe = None,
    config: ConfigFile = None,
    from_step: Annotated[
        int | None, typer.Option(help="resume from the checkpoint of this step; later ones are set aside")
    ] = None,
) -> None:
    """Train or resume a run; for several processes use torchrun -m npp_ds train ..., or srun (slurm/).

    Example: npp train --recipe quickstart name=second seed=1
    """
    try:
        with StopRequests() as stop:  # before the imports, which take seconds
            _train(recipe, config, overrides or (), from_step, stop)
    except Preempted:
        # A process that gave up waiting for the others has a thread in native code, which would abort a normal exit.
        exit_now(PREEMPTED)


def _train(
    recipe: str | None, config: Path | None, overrides: Sequence[str], from_step: int | None, stop: StopRequests
) -> None:
    from npp_ds.config.load import load_run

    try:
        run = load_run(recipe, config, overrides, read_environment().world_size)
    except UserError as error:
        raise UserError(str(error), on_all_ranks=True) from error

    from npp_ds.training.loss_checks import NonFiniteError
    from npp_ds.training.trainer import train as train_run

    try:
        with memory_advice(
            "lower schedule.micro_batch_size, set model.activation_checkpointing=block or deepspeed.config=zero3, or "
            "use more processes; npp plan and npp doctor --step show what fits"
        ):
            train_run(run, from_step, stop)
    except NonFiniteError as error:
        if read_environment().rank == 0:
            print_error(f"error: {error}; stopped before the weights changed")
        sys.exit(NON_FINITE)


def doctor(
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe; default: check only the machine")] = None,
    config: ConfigFile = None,
    step: Annotated[bool, typer.Option("--step", help="also train two steps at each patch side")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Check machine, processes and run in seconds, by hand or first in a job: what is wrong, where, what to do.

    Example: npp doctor --recipe xl_256 data.train=/data/train
    """
    from npp_ds.doctor.runner import Request, run_doctor

    # End without leaving the process group: that could hang if its collectives hang, and sometimes aborts in native
    # code (torch 2.15, gloo, under srun), with an exit code that would requeue a healthy job.
    exit_now(run_doctor(Request(recipe, config, tuple(overrides or ()), step, as_json)))


def plan(
    overrides: Overrides = None,
    recipe: Recipe = None,
    config: ConfigFile = None,
    gpus: Annotated[int, typer.Option(min=1, help="processes, one GPU each")] = 8,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}, or any name with its figures")] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="memory of a GPU in GB")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(min=0.1, help="peak rate of dense bf16 products, TFLOP/s")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.01, help="GB/s that each GPU sends to the others")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="training images; default: those of the shards, else ImageNet's")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, help="model FLOPs over the peak; default: as measured, else 0.4"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="draw the schedule into this file (.png, .svg, .pdf): sides, rates, cost")
    ] = None,
) -> None:
    """Estimate a run before it starts: FLOPs, memory per GPU, micro-batches, time.

    Example: npp plan --recipe xxl_256 --gpus 32 --gpu h100
    """
    from npp_ds.config.load import load_config
    from npp_ds.planning.plan import make_plan
    from npp_ds.planning.table import print_plan
    from npp_ds.utils.gpu_specs import find_gpu

    run = load_config(recipe, config, overrides or (), gpus)
    planned = make_plan(run, find_gpu(gpu, gpu_memory, gpu_tflops, bandwidth), gpus, mfu, images)
    if plot:
        from npp_ds.reporting.plot import write_schedule

        write_schedule(planned, plot)
    print_plan(planned, json_)
    for warning in planned.warnings:
        warn(warning)


def status(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")],
    watch: Annotated[bool, typer.Option("--watch", help="show it again every few seconds, until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list of one object per run")] = False,
) -> None:
    """Show where runs are, from their files: stage, loss, speed, cost, time left, checkpoint, warnings.

    Example: npp status runs/* --watch
    """
    from npp_ds.reporting.status import show_status

    if not show_status(runs, watch, as_json):
        sys.exit(USER_ERROR)


def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run folders; several: one page compares them")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="the page; default: RUN/report.html, for several comparison.html beside the first"),
    ] = None,
    next_step: Annotated[list[str] | None, typer.Option(help="a line for 'what to run next'; may be repeated")] = None,
) -> None:
    """Write a page about a run, or about several, and print closing tables: time, cost, likelihood, samples, files.

    Example: npp report runs/quickstart
    """
    from npp_ds.reporting.report import report_runs
    from npp_ds.reporting.summary import print_summary

    with content_of(", ".join(map(str, run_dirs)), "what npp train, sample and evaluate write"):
        for summary in report_runs(run_dirs, out=out, next_steps=next_step or ()):
            print_summary(summary)


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
