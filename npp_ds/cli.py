"""The command line `npp`: thin calls into the rooms, and one place that turns errors into a line and an exit code.

Exit codes: 0 done; 2 something to mend (the text says what); 3 the loss or the gradients left the finite numbers;
4 a process stalled (stacks in stalled.txt); 75 a signal came and a checkpoint was made: the same command goes on.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from npp_ds.errors import UserError
from npp_ds.training.preemption import PREEMPTED, Preempted, StopRequests

app = typer.Typer(
    name="npp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

shards = typer.Typer(help="Look after folders of code shards.", no_args_is_help=True)
app.add_typer(shards, name="shards")

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
def _group(
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", hidden=True)
    ] = None,  # the deepspeed launcher adds it
) -> None:
    """Trains class-conditional autoregressive image models with Next Patch Prediction."""


@app.command()
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as schedule.epochs=100")] = None,
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe")] = None,
    config: Annotated[Path | None, typer.Option(help="a YAML file with the keys of a recipe")] = None,
    from_step: Annotated[
        int | None, typer.Option(help="go on from the checkpoint of this step; later ones are set aside")
    ] = None,
) -> None:
    """Train a run, or go on with it; start several processes with torchrun -m npp_ds train ..."""
    try:
        with StopRequests() as stop:  # before the imports, which take seconds
            _train(recipe, config, overrides or (), from_step, stop)
    except Preempted:
        sys.exit(PREEMPTED)


def _train(
    recipe: str | None, config: Path | None, overrides: Sequence[str], from_step: int | None, stop: StopRequests
) -> None:
    from npp_ds.config_checks import load_config
    from npp_ds.training.launch import world_size_of_environment

    try:
        run = load_config(recipe, config, overrides, world_size_of_environment())
    except UserError as error:
        raise UserError(str(error), on_all_ranks=True) from error

    from npp_ds.training.trainer import NonFiniteError
    from npp_ds.training.trainer import train as train_run

    try:
        train_run(run, from_step, stop)
    except NonFiniteError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}; stopped before the weights changed", file=sys.stderr, flush=True)
        sys.exit(3)


@app.command()
def sample(
    run_dir: RunDirectory,
    classes: Annotated[str | None, typer.Option(help="numbers or names with commas between; all when left out")] = None,
    labels: Annotated[str, typer.Option(help="balanced, or random: drawn as the published script does")] = "balanced",
    per_class: Annotated[int, typer.Option(help="images per class")] = 10,
    cfg_scale: Annotated[float, typer.Option(help="scale of classifier-free guidance; 1: none")] = 1.0,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest code")] = 1.0,
    top_k: Annotated[int, typer.Option(help="draw from this many likeliest codes; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest codes of this total probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="image i is the same for any batch size and number of images")] = 0,
    step: Annotated[int | None, typer.Option(help="checkpoint; the newest complete one when left out")] = None,
    weights: Annotated[str, typer.Option(help="raw, or ema: their moving average")] = "raw",
    patch_side: Annotated[int, typer.Option(help="sample a coarse model, one code shown per patch")] = 1,
    image_size: Annotated[int | None, typer.Option(help="resize to this many pixels (bicubic)")] = None,
    batch_size: Annotated[int, typer.Option(help="images decoded at a time")] = 64,
    out: Annotated[Path | None, typer.Option(help="folder; one under RUN_DIR/samples when left out")] = None,
) -> None:
    """Draw images from a run: grid.png, samples.npz for metrics, samples.json."""
    from npp_ds.sampling.sampler import Options, sample_run

    options = Options(seed, cfg_scale, temperature, top_k, top_p, patch_side)
    with _progress("sampling") as progress:
        made = sample_run(
            run_dir,
            step=step,
            weights=weights,
            out=out,
            classes=[name.strip() for name in classes.split(",")] if classes else None,
            labels=labels,
            per_class=per_class,
            options=options,
            batch_size=batch_size,
            image_size=image_size,
            progress=progress,
        )
    record = made.record
    rate = f"{record['images_per_second']:.1f} images/s"
    print(f"{record['count']} images of step {record['checkpoint_step']} at {rate} in {made.directory}")


@app.command()
def evaluate(
    run_dir: RunDirectory,
    reference: Annotated[str, typer.Option(help="real images: image shards, as a file, folder or pattern")],
    samples: Annotated[
        Path | None, typer.Option(help="folder that `npp sample` wrote; the newest when left out")
    ] = None,
) -> None:
    """Compare samples with real images: class agreement and Frechet distance by the shipped classifier."""
    from npp_ds.evaluation.fid import evaluate_folder
    from npp_ds.sampling.folder import newest_samples

    result = evaluate_folder(samples or newest_samples(run_dir), reference)
    real = result.get("reference_class_agreement")
    print(
        f"{result['num_images']} samples of {result['samples_dir']}: "
        f"{result['class_agreement']:.1%} show the class they were asked for"
        + (f" (real images: {real:.1%})" if real is not None else "")
        + f"; Frechet distance {result['frechet_distance']:.2f} on {result['extractor']}, "
        f"{result['num_reference_images']} real images"
    )


@app.command()
def report(
    run_dir: RunDirectory,
    next_step: Annotated[list[str] | None, typer.Option(help="a line for 'what to run next'; may be repeated")] = None,
) -> None:
    """Plot a run and show its closing table: time per stage, cost, likelihood, samples, where every file lies."""
    from npp_ds.reporting.report import report_run

    report_run(run_dir, next_steps=next_step or ())


@shards.command()
def verify(directory: Annotated[Path, typer.Argument(help="folder with manifest.json")]) -> None:
    """Read every shard again: hashes, counts, keys, ranges of codes and labels; say which file is bad."""
    from npp_ds.data.shards import Manifest
    from npp_ds.data.shards import verify as problems_of_set

    with _progress("verifying") as progress:
        problems = problems_of_set(directory, progress)
    if problems:
        raise UserError(f"{directory}: {len(problems)} problems\n" + "\n".join(f"  - {p}" for p in problems))
    manifest = Manifest.load(directory)
    print(f"{directory}: {manifest.num_samples} images in {len(manifest.shards)} shards, all as the manifest says")


@shards.command()
def show(
    directory: Annotated[Path, typer.Argument(help="folder with manifest.json")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="its name or file; found by itself when it is shipped or lies in this folder"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the PNG; DIRECTORY/contact_sheet.png when left out")] = None,
    classes: Annotated[int, typer.Option(min=1, max=50, help="rows of the picture")] = 12,
    per_class: Annotated[int, typer.Option(min=1, max=50, help="images in a row")] = 8,
    seed: Annotated[int, typer.Option(help="another seed shows other images")] = 0,
) -> None:
    """Show what a set holds: manifest, code usage, images per class, and a picture of random images by class."""
    from npp_ds.files import write_atomic
    from npp_ds.sampling.grid import sample_grid
    from npp_ds.tokenizer import contents
    from npp_ds.tokenizer.loading import tokenizer_of

    with _progress("reading") as progress:
        found = contents.read_contents(directory, progress)
    print("\n".join(contents.describe(found)), flush=True)
    codes, labels = contents.random_codes(directory, found, classes, per_class, seed)
    images = contents.decode(tokenizer_of(found.manifest.tokenizer, tokenizer), codes)
    picture = sample_grid(images, labels, found.manifest.class_names, per_row=per_class, max_rows=classes)
    path = out or directory / "contact_sheet.png"
    write_atomic(path, lambda file: picture.save(file, "PNG"))
    print(f"{path}: {len(labels)} random images of {len(set(labels.tolist()))} classes, each a random crop")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that draws a bar on a terminal and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
