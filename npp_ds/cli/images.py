"""Commands about what a model has learned: sample, evaluate, likelihood."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npp_ds.cli.common import GridSize, Heads, warn
from npp_ds.distributed.environment import Place, place_of_environment
from npp_ds.errors import UserError
from npp_ds.utils.progress import Progress

if TYPE_CHECKING:
    from npp_ds.evaluation.sweep import Sweep
    from npp_ds.sampling.job import Sampling


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
    from npp_ds.checkpoint.open import open_weights
    from npp_ds.distributed.environment import choose_device, choose_dtype
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
        warn(found.guess_warning())
        warn(stage_warning(found, request.options))
    _draw(job, place)


def _draw(job: "Sampling", place: "Place") -> None:
    """Runs the sampling of this process and says what came of it."""
    try:
        with Progress("sampling", shown=place.rank == 0) as progress:
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
    with Progress("reference") as progress:
        made = make_reference(out, images, network, image_size, progress)
    print(f"{out}: statistics of {made.source.num_images} images by {network.name}")


def _check_reference(
    source: Path | None, reference: str, extractor: str, inception_weights: Path | None, image_size: int | None
) -> None:
    from npp_ds.checkpoint.open import open_weights
    from npp_ds.evaluation.evaluate import open_extractor
    from npp_ds.evaluation.reference import check_reference

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
    with Progress("reference") as progress:
        loaded = load_reference(reference, network, image_size, progress)
    with Progress("samples") as progress:
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
    with Progress("reference") as progress:
        loaded = load_reference(reference, network, image_size, progress)
    results, folder = run_sweep(swept, loaded, network, out, Progress, place)
    print(f"{table(swept.name, results)}written to {folder}")


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
    from npp_ds.checkpoint.open import open_weights
    from npp_ds.evaluation.likelihood import likelihood_of
    from npp_ds.evaluation.output_paths import try_target, writing
    from npp_ds.reporting.likelihood import write_likelihood

    opened = open_weights(source, step=step, kind=weights)
    shards = data or (opened.config.data.val if opened.config else None)
    if shards is None:
        raise UserError(f"--data: missing, and {source} names no held-out shards (data.val); give code shards")
    usual = source / "likelihood.json" if source.is_dir() else source.with_suffix(".likelihood.json")
    path = try_target(out or usual)
    if path.suffix != ".json":
        raise UserError(f"--out: found {path}, expected a name that ends in .json; the picture lies beside it")
    cache_dir = opened.config.data.cache_dir if opened.config else None
    options = {"limit": limit, "patch_side": patch_side, "precision": precision, "cache_dir": cache_dir}
    with Progress("measuring") as progress:
        result = likelihood_of(opened, shards, **options, progress=progress)
    with writing(path):
        picture = write_likelihood(path, result)
    print(
        f"{result['images']} images at patch side {patch_side}: {result['nats_per_code']:.4f} nats per code, "
        f"{result['bits_per_image']:.1f} bits per image, top-1 {result['top1_accuracy']:.2%}, "
        f"top-5 {result['top5_accuracy']:.2%} ({precision}); {path}, {picture}"
    )
