"""The command line `npp`: thin calls into the rooms.

Exit codes: 0 done; 2 something to mend (the text says what); 3 the loss or the gradients left the finite numbers;
4 a process stalled (stacks in stalled.txt); 75 a signal came and a checkpoint was made: the same command goes on.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npp_ds.errors import UserError
from npp_ds.exits import exit_code_of, tell
from npp_ds.place import Place, place_of_environment
from npp_ds.training.preemption import PREEMPTED, Preempted, StopRequests

if TYPE_CHECKING:
    from npp_ds.evaluation.sweep import Sweep
    from npp_ds.sampling.job import Sampling

app = typer.Typer(
    name="npp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

shards = typer.Typer(help="Look after folders of code shards.", no_args_is_help=True)
app.add_typer(shards, name="shards")

RunDirectory = Annotated[Path, typer.Argument(help="a run folder")]
Heads = Annotated[
    int | None,
    typer.Option(min=1, help="attention heads of a published checkpoint; dim / 64 when the file does not tell"),
]
GridSize = Annotated[
    int | None,
    typer.Option(min=1, help="side of a published checkpoint's code map: 16 at 256 px (when left out), 24 at 384 px"),
]


def main() -> None:
    """Runs the command line and exits."""
    sys.exit(exit_code_of(app))


def _warn(text: str | None) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


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
    """Train a run, or go on with it; start several processes with torchrun -m npp_ds train ..., or srun (slurm/)."""
    try:
        with StopRequests() as stop:  # before the imports, which take seconds
            _train(recipe, config, overrides or (), from_step, stop)
    except Preempted:
        sys.exit(PREEMPTED)


def _train(
    recipe: str | None, config: Path | None, overrides: Sequence[str], from_step: int | None, stop: StopRequests
) -> None:
    from npp_ds.config_checks import load_config

    try:
        run = load_config(recipe, config, overrides, place_of_environment().world_size)
    except UserError as error:
        raise UserError(str(error), on_all_ranks=True) from error

    from npp_ds.training.trainer import NonFiniteError
    from npp_ds.training.trainer import train as train_run

    try:
        train_run(run, from_step, stop)
    except NonFiniteError as error:
        if place_of_environment().rank == 0:
            tell(f"error: {error}; stopped before the weights changed")
        sys.exit(3)


@app.command()
def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `npp train`")] = None,
    recipe: Annotated[str | None, typer.Option(help="a shipped recipe; with none, the machine alone")] = None,
    config: Annotated[Path | None, typer.Option(help="a YAML file with the keys of a recipe")] = None,
    step: Annotated[bool, typer.Option("--step", help="also train a step at each patch side")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Check machine, processes and run in seconds, by hand or first in a job: what is wrong, where, what to do."""
    from npp_ds.doctor.examination import Request, examine

    sys.exit(examine(Request(recipe, config, tuple(overrides or ()), step, as_json)))


@app.command()
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
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="share of the peak that the model's FLOPs reach")] = 0.4,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Tell what a run will take before it starts: FLOPs, memory per GPU, micro-batches, days."""
    from npp_ds.config_checks import load_config
    from npp_ds.reporting.gpus import find_gpu
    from npp_ds.reporting.plan import make_plan
    from npp_ds.reporting.plan_table import print_plan

    run = load_config(recipe, config, overrides or (), gpus)
    print_plan(make_plan(run, find_gpu(gpu, gpu_memory, gpu_tflops, bandwidth), gpus, mfu, images), json_)


@app.command()
def sample(
    source: Annotated[Path, typer.Argument(help="a run folder, an exported file or a published checkpoint")],
    classes: Annotated[str | None, typer.Option(help="numbers or names with commas between; all when left out")] = None,
    labels: Annotated[str, typer.Option(help="balanced, or random: drawn as the published script does")] = "balanced",
    per_class: Annotated[int | None, typer.Option(help="images per class; 10 when --count is left out too")] = None,
    count: Annotated[int | None, typer.Option(help="images in all, instead of --per-class")] = None,
    cfg_scale: Annotated[float, typer.Option(help="scale of classifier-free guidance; 1: none")] = 1.0,
    cfg_schedule: Annotated[
        str, typer.Option(help="constant, or linear or cosine: guidance grows from 1 to its scale over the positions")
    ] = "constant",
    cfg_power: Annotated[float, typer.Option(help="bends a schedule: guidance grows with position ** power")] = 1.0,
    cfg_interval: Annotated[
        int, typer.Option(help="position after which guidance ends, counted as LlamaGen does; -1: none")
    ] = -1,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest code")] = 1.0,
    top_k: Annotated[int, typer.Option(help="draw from this many likeliest codes; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest codes of this total probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="image i is the same for any batch size and number of images")] = 0,
    step: Annotated[int | None, typer.Option(help="checkpoint; the newest complete one when left out")] = None,
    weights: Annotated[str, typer.Option(help="raw, or ema: their moving average")] = "raw",
    heads: Heads = None,
    grid_size: GridSize = None,
    patch_side: Annotated[int, typer.Option(help="sample a coarse model, one code shown per patch")] = 1,
    image_size: Annotated[int | None, typer.Option(help="resize to this many pixels (bicubic)")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="its name or file; that of the run when left out")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 on a GPU")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    batch_size: Annotated[int, typer.Option(help="images decoded at a time")] = 64,
    part_size: Annotated[int, typer.Option(help="images that a process draws before it writes them")] = 256,
    png: Annotated[bool, typer.Option("--png", help="write images/000000.png .. and labels.csv as well")] = False,
    out: Annotated[Path | None, typer.Option(help="folder; one under SOURCE/samples when left out")] = None,
) -> None:
    """Draw images: grid.png, samples.npz for metrics, samples.json. Killed, the same command goes on.

    Several processes share the work: accelerate launch -m npp_ds sample ..., torchrun or srun.
    """
    from npp_ds.place import choose_device, choose_dtype
    from npp_ds.sampling.job import Sampling
    from npp_ds.sampling.request import (
        Request,
        companions,
        default_folder,
        image_count,
        parse_classes,
        split_classes,
        stage_warning,
    )
    from npp_ds.sampling.sampler import Options
    from npp_ds.weights.source import open_weights

    place = place_of_environment()
    device = choose_device(device, place.local_rank)
    found = open_weights(source, step=step, kind=weights, n_heads=heads, grid_size=grid_size)
    decoder, class_names = companions(found, tokenizer)
    wanted = split_classes(classes, class_names) if classes else None
    chosen = parse_classes(wanted, found.model.num_classes, class_names)
    request = Request(
        classes=chosen,
        count=image_count(len(chosen), per_class, count),
        labels=labels,
        options=Options(
            seed=seed,
            cfg_scale=cfg_scale,
            cfg_schedule=cfg_schedule,
            cfg_power=cfg_power,
            cfg_interval=cfg_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            patch_side=patch_side,
        ),
        image_size=image_size,
        dtype=choose_dtype(dtype, device),
        part_size=part_size,
    )
    how = {"class_names": class_names, "device": device, "batch_size": batch_size, "png": png}
    job = Sampling(found, decoder, request, out or default_folder(found, request), **how)
    if place.rank == 0:
        if not found.config:
            print(f"{source}: {found.describe()}", flush=True)
        _warn(found.guess_warning())
        _warn(stage_warning(found, request.options))
    _draw(job, place)


def _draw(job: "Sampling", place: "Place") -> None:
    """Runs the sampling of this process and says what came of it."""
    try:
        with _progress("sampling", shown=place.rank == 0) as progress:
            drawn = job.run(place.rank, place.world_size, progress)
        record = job.finish()
    except OSError as error:
        text = f"{error.filename or job.out}: {error.strerror or error}"
        raise UserError(f"{text}; the parts that are finished are kept, run the same command again") from error
    if record is None:
        print(f"process {place.rank} is done ({drawn} images); others are still at work", flush=True)
        return
    step = "" if record["checkpoint_step"] is None else f" of step {record['checkpoint_step']}"
    rate = f"this process drew {drawn} at {job.images_per_second:.3g} images/s" if drawn else "nothing was left to do"
    repeated = record["repeated_images"]
    print(
        f"{record['count']} images{step} in {job.out}: {rate}; "
        + (f"{repeated} are pixel for pixel equal to another one" if repeated else "no two are equal")
    )


@app.command()
def evaluate(
    reference: Annotated[
        str, typer.Option(help="an .npz of statistics (ADM's, or made here) or of images, image shards, or a folder")
    ],
    source: Annotated[
        Path | None, typer.Argument(help="a run folder: its newest samples are evaluated; with --sweep any weights")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="evaluate these: a folder that `npp sample` wrote, an .npz, a folder of images")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the result (of a sweep: its folder); beside the samples when left out")
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="inception, fashion_mnist (the shipped classifier), or auto: that of the reference")
    ] = "auto",
    inception_weights: Annotated[
        Path | None, typer.Option(help="file of Inception's weights; torch-fidelity's own is fetched when left out")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="centre-crop the reference's encoded images to this; of a sweep: samples' size")
    ] = None,
    make_reference: Annotated[
        Path | None, typer.Option(help="write the reference's statistics to this .npz, and evaluate nothing")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="say whether reference and extractor fit the run, and evaluate nothing")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(help="cfg=1.5,1.75,2.0, checkpoint=1000,2000 or checkpoint=all: sample, evaluate"),
    ] = None,
    per_class: Annotated[int | None, typer.Option(help="of a sweep: images per class; 10 when left out")] = None,
    labels: Annotated[str, typer.Option(help="of a sweep: balanced or random")] = "balanced",
    cfg_scale: Annotated[float, typer.Option(help="of a sweep over checkpoints")] = 1.0,
    seed: Annotated[int, typer.Option(help="of a sweep")] = 0,
    step: Annotated[int | None, typer.Option(help="of a sweep over cfg: checkpoint; the newest when left out")] = None,
    weights: Annotated[str, typer.Option(help="of a sweep: raw or ema")] = "raw",
    patch_side: Annotated[
        int | None,
        typer.Option(min=1, help="of a sweep: of the samples; that of each checkpoint's stage when left out"),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="of a sweep: its name or file; that of the run")] = None,
    dtype: Annotated[str, typer.Option(help="of a sweep: fp32, bf16, or auto: bf16 on a GPU")] = "auto",
    batch_size: Annotated[int, typer.Option(help="of a sweep: images decoded at a time")] = 64,
) -> None:
    """Compare samples with real images: FID, sFID, Inception score, precision, recall, class agreement.

    One process measures; several (accelerate launch, torchrun or srun) share the sampling of a sweep.
    """
    place = place_of_environment()
    if place.rank and (sweep is None or make_reference is not None):
        return
    if make_reference is not None:
        _make_reference(make_reference, reference, extractor, inception_weights, image_size)
    elif check:
        _check_reference(source, reference, extractor, inception_weights, image_size)
    elif sweep is not None:
        if source is None:
            raise UserError("sweep: found no weights to sample; give a run folder")
        from npp_ds.evaluation.sweep import Settings, open_sweep
        from npp_ds.sampling.sampler import Options

        options = Options(seed=seed, cfg_scale=cfg_scale)
        settings = Settings(
            per_class, labels, options, step, weights, dtype, batch_size, image_size, tokenizer, patch_side
        )
        swept = open_sweep(source, sweep, settings, place.local_rank)
        _sweep(swept, place, reference, extractor, inception_weights, image_size, out)
    else:
        _evaluate(source, samples, reference, extractor, inception_weights, image_size, out)


def _make_reference(
    out: Path, images: str, extractor: str, inception_weights: Path | None, image_size: int | None
) -> None:
    from npp_ds.evaluation.evaluate import open_extractor
    from npp_ds.evaluation.reference import make_reference

    network = open_extractor(extractor, images, None, inception_weights)
    with _progress("reference") as progress:
        made = make_reference(out, images, network, image_size, progress)
    print(f"{out}: statistics of {made.source.num_images} images by {network.name}")


def _check_reference(
    source: Path | None, reference: str, extractor: str, inception_weights: Path | None, image_size: int | None
) -> None:
    from npp_ds.evaluation.evaluate import open_extractor
    from npp_ds.evaluation.reference import check_reference
    from npp_ds.weights.source import open_weights

    trained_on = open_weights(source).tokenizer if source else None
    network = open_extractor(extractor, reference, trained_on.name if trained_on else None, inception_weights)
    check_reference(reference, network, image_size)
    print(f"{reference}: fit to compare with, by {network.name}")


def _evaluate(
    source: Path | None,
    samples: Path | None,
    reference: str,
    extractor: str,
    inception_weights: Path | None,
    image_size: int | None,
    out: Path | None,
) -> None:
    from npp_ds.evaluation.evaluate import describe, evaluate_images, open_extractor, result_file, write_result
    from npp_ds.evaluation.images import open_images
    from npp_ds.evaluation.reference import load_reference
    from npp_ds.sampling.folder import newest_samples

    if samples is None:
        if source is None:
            raise UserError("nothing to evaluate: give a run folder, --samples, or --make-reference OUT.npz")
        samples = newest_samples(source)
    images = open_images(samples)
    path = result_file(images.path, out)
    network = open_extractor(extractor, reference, images.record.get("tokenizer", {}).get("name"), inception_weights)
    with _progress("reference") as progress:
        loaded = load_reference(reference, network, image_size, progress)
    with _progress("samples") as progress:
        result = evaluate_images(images, loaded, network, progress)
    print(describe(result))
    print(f"written to {write_result(result, path)}")


def _sweep(
    swept: "Sweep",
    place: "Place",
    reference: str,
    extractor: str,
    inception_weights: Path | None,
    image_size: int | None,
    out: Path | None,
) -> None:
    from npp_ds.evaluation.evaluate import open_extractor
    from npp_ds.evaluation.reference import load_reference
    from npp_ds.evaluation.sweep import draw_share, run_sweep, table

    if place.rank:
        draw_share(swept, place)
        return
    network = open_extractor(extractor, reference, swept.tokenizer.name, inception_weights)
    with _progress("reference") as progress:
        loaded = load_reference(reference, network, image_size, progress)
    results, folder = run_sweep(swept, loaded, network, out, _progress, place)
    print(f"{table(swept.name, results)}written to {folder}")


@app.command()
def likelihood(
    source: Annotated[Path, typer.Argument(help="a run folder, or a file of weights")],
    data: Annotated[
        str | None, typer.Option(help="held-out code shards; those of the run (data.val) when left out")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="images, evenly spread over the set; all when left out")
    ] = None,
    patch_side: Annotated[int, typer.Option(min=1, help="side of the patches that the codes are cut into")] = 1,
    weights: Annotated[str, typer.Option(help="raw, or ema: their moving average")] = "raw",
    step: Annotated[int | None, typer.Option(help="checkpoint; the newest complete one when left out")] = None,
    precision: Annotated[str, typer.Option(help="of matrix products: fp32 or bf16")] = "fp32",
    out: Annotated[
        Path | None, typer.Option(help="the JSON; RUN/likelihood.json or FILE.likelihood.json when left out")
    ] = None,
) -> None:
    """Measure held-out codes: nats per code, bits per image, accuracy, and a picture of where the model is unsure."""
    if place_of_environment().rank:  # one process does it all
        return
    from npp_ds.evaluation.likelihood import likelihood_of
    from npp_ds.evaluation.targets import try_target, writing
    from npp_ds.reporting.likelihood import write_likelihood
    from npp_ds.weights.source import open_weights

    opened = open_weights(source, step=step, kind=weights)
    shards = data or (opened.config.data.val if opened.config else None)
    if shards is None:
        raise UserError(f"--data: missing, and {source} names no held-out shards (data.val); give code shards")
    usual = source / "likelihood.json" if source.is_dir() else source.with_suffix(".likelihood.json")
    path = try_target(out or usual)
    cache_dir = opened.config.data.cache_dir if opened.config else None
    options = {"limit": limit, "patch_side": patch_side, "precision": precision, "cache_dir": cache_dir}
    with _progress("measuring") as progress:
        result = likelihood_of(opened, shards, **options, progress=progress)
    with writing(path):
        picture = write_likelihood(path, result)
    print(
        f"{result['images']} images at patch side {patch_side}: {result['nats_per_code']:.4f} nats per code, "
        f"{result['bits_per_image']:.1f} bits per image, top-1 {result['top1_accuracy']:.2%}, "
        f"top-5 {result['top5_accuracy']:.2%} ({precision}); {path}, {picture}"
    )


@app.command()
def report(
    run_dir: RunDirectory,
    next_step: Annotated[list[str] | None, typer.Option(help="a line for 'what to run next'; may be repeated")] = None,
) -> None:
    """Plot a run and show its closing table: time per stage, cost, likelihood, samples, where every file lies."""
    from npp_ds.reporting.report import report_run

    report_run(run_dir, next_steps=next_step or ())


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a run folder, or a file with weights")],
    out: Annotated[Path, typer.Option(help="the file to write: .safetensors, or .pt for the published format")],
    step: Annotated[int | None, typer.Option(help="checkpoint; the newest complete one when left out")] = None,
    weights: Annotated[str, typer.Option(help="raw, or ema: their moving average")] = "raw",
    heads: Heads = None,
    grid_size: GridSize = None,
    layout: Annotated[
        str, typer.Option("--format", help="safetensors, or published: what the published sampling scripts load")
    ] = "safetensors",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    force: Annotated[bool, typer.Option("--force", help="replace a file that exists")] = False,
) -> None:
    """Write the weights of a run to one file, for sampling, for further training, or in the published format."""
    from npp_ds.weights.exported import export_weights
    from npp_ds.weights.source import open_weights

    opened = open_weights(source, step=step, kind=weights, n_heads=heads, grid_size=grid_size, verify=True)
    export_weights(opened, out, layout=layout, dtype=dtype, force=force)
    print(f"{out}: {opened.describe()}")
    if layout == "safetensors":  # the published format has no place for a grid
        _warn(opened.guess_warning())


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="a published checkpoint, such as c2i_B_256.pt")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    heads: Heads = None,
    grid_size: GridSize = None,
    weights: Annotated[str, typer.Option(help="raw, or ema: their moving average")] = "raw",
    force: Annotated[bool, typer.Option("--force", help="replace a file that exists")] = False,
) -> None:
    """Turn a published LlamaGen or NPP checkpoint into a file for sampling, evaluation and further training."""
    from npp_ds.weights.exported import export_weights
    from npp_ds.weights.source import open_weights

    opened = open_weights(file, kind=weights, n_heads=heads, grid_size=grid_size)
    export_weights(opened, out, force=force)
    print(f"{out}: {opened.describe()}")
    _warn(opened.guess_warning())


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
def _progress(what: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that draws a bar on a terminal and prints a line now and then elsewhere."""
    if not shown:
        yield lambda done, total: None
    elif not sys.stderr.isatty():
        yield _lines(what)
    else:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(what: str, seconds_between: float = 30.0) -> Callable[[int, int], None]:
    printed = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > seconds_between:
            printed = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return show
