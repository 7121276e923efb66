"""Commands about a run: train, doctor, plan, report."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from npp_ds.cli.common import RunDirectory
from npp_ds.cli.exit_codes import tell
from npp_ds.distributed.environment import read_environment
from npp_ds.errors import UserError
from npp_ds.training.preemption import PREEMPTED, Preempted, StopRequests


def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as schedule.epochs=100")] = None,
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe")] = None,
    config: Annotated[Path | None, typer.Option(help="a YAML file with the keys of a recipe")] = None,
    from_step: Annotated[
        int | None, typer.Option(help="go on from the checkpoint of this step; later ones are set aside")
    ] = None,
) -> None:
    """Train a run, or go on with it; start several processes with torchrun -m npp_ds train ..., or srun (slurm/)."""
    try:
        with StopRequests() as stop:  # before the imports, which take seconds
            _train(recipe, config, overrides or (), from_step, stop)
    except Preempted:
        sys.exit(PREEMPTED)


def _train(
    recipe: str | None, config: Path | None, overrides: Sequence[str], from_step: int | None, stop: StopRequests
) -> None:
    from npp_ds.config.load import load_config

    try:
        run = load_config(recipe, config, overrides, read_environment().world_size)
    except UserError as error:
        raise UserError(str(error), on_all_ranks=True) from error

    from npp_ds.training.trainer import NonFiniteError
    from npp_ds.training.trainer import train as train_run

    try:
        train_run(run, from_step, stop)
    except NonFiniteError as error:
        if read_environment().rank == 0:
            tell(f"error: {error}; stopped before the weights changed")
        sys.exit(3)


def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `npp train`")] = None,
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe; with none, the machine alone")] = None,
    config: Annotated[Path | None, typer.Option(help="a YAML file with the keys of a recipe")] = None,
    step: Annotated[bool, typer.Option("--step", help="also train a step at each patch side")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Check machine, processes and run in seconds, by hand or first in a job: what is wrong, where, what to do."""
    from npp_ds.doctor.runner import Request, run_doctor

    code = run_doctor(Request(recipe, config, tuple(overrides or ()), step, as_json))
    sys.stdout.flush()
    sys.stderr.flush()
    # All is said. To leave a group whose collectives hang could hang, and an orderly end now and then aborts in native
    # code (torch 2.15, gloo, seen under srun): with a code that would send a healthy job back to the queue.
    os._exit(code)


def plan(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as schedule.epochs=100")] = None,
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe")] = None,
    config: Annotated[Path | None, typer.Option(help="a YAML file with the keys of a recipe")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="processes, one GPU each")] = 8,
    gpu: Annotated[
        str, typer.Option(help="a100-40, a100-80, h100, h200, b200, l40s, rtx4090, or another's name")
    ] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="its memory in GB")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(min=0.1, help="its peak of dense bf16 products, TFLOP/s")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.01, help="GB/s that each GPU sends to the others")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="training images; of the shards, or ImageNet's, when left out")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1, help="share of the peak that the model's FLOPs reach; measured, or 0.4, when left out"
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Tell what a run will take before it starts: FLOPs, memory per GPU, micro-batches, days."""
    from npp_ds.config.load import load_config
    from npp_ds.planning.plan import make_plan
    from npp_ds.planning.table import print_plan
    from npp_ds.utils.gpu_specs import find_gpu

    run = load_config(recipe, config, overrides or (), gpus)
    print_plan(make_plan(run, find_gpu(gpu, gpu_memory, gpu_tflops, bandwidth), gpus, mfu, images), json_)


def report(
    run_dir: RunDirectory,
    next_step: Annotated[list[str] | None, typer.Option(help="a line for 'what to run next'; may be repeated")] = None,
) -> None:
    """Plot a run and show its closing table: time per stage, cost, likelihood, samples, where every file lies."""
    from npp_ds.reporting.report import report_run

    report_run(run_dir, next_steps=next_step or ())
