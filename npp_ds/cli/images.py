"""Commands for images and likelihoods of a model: sample, evaluate, likelihood."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npp_ds.cli.common import GridSize, Heads, WeightsKind, warn
from npp_ds.distributed.environment import ProcessInfo, read_environment
from npp_ds.errors import UserError, memory_advice
from npp_ds.utils.files import check_writable
from npp_ds.utils.screen import Progress, say

if TYPE_CHECKING:
    from npp_ds.evaluation.evaluate import Reference
    from npp_ds.evaluation.extractors import Extractor
    from npp_ds.evaluation.images import ImageSet
    from npp_ds.evaluation.sweep import Sweep
    from npp_ds.sampling.job import Sampling


def sample(
    source: Annotated[Path, typer.Argument(help="a run folder, an exported file or a published checkpoint")],
    classes: Annotated[str | None, typer.Option(help="comma-separated numbers or names; default: all")] = None,
    labels: Annotated[str, typer.Option(help="balanced, or random, as in the published script")] = "balanced",
    per_class: Annotated[int | None, typer.Option(help="images per class; default: 10, without --count")] = None,
    count: Annotated[int | None, typer.Option(help="total number of images, instead of --per-class")] = None,
    cfg_scale: Annotated[float, typer.Option(help="scale of classifier-free guidance; 1: no guidance")] = 1.0,
    cfg_schedule: Annotated[
        str, typer.Option(help="constant, or linear or cosine: the scale grows from 1 over the positions")
    ] = "constant",
    cfg_power: Annotated[float, typer.Option(help="the scale of a schedule grows with position ** power")] = 1.0,
    cfg_interval: Annotated[
        int, typer.Option(help="position after which guidance ends, counted as in LlamaGen; -1: never")
    ] = -1,
    temperature: Annotated[float, typer.Option(help="0: always the most likely code")] = 1.0,
    top_k: Annotated[int, typer.Option(help="sample from this many most likely codes; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="sample from the most likely codes of this total probability")] = 1.0,
    seed: Annotated[
        int, typer.Option(help="random seed; image i does not depend on batch size or number of images")
    ] = 0,
    step: Annotated[int | None, typer.Option(help="checkpoint; default: the newest complete one")] = None,
    weights: WeightsKind = "raw",
    heads: Heads = None,
    grid_size: GridSize = None,
    patch_side: Annotated[int, typer.Option(help="sample a coarse model, which shows one code per patch")] = 1,
    image_size: Annotated[int | None, typer.Option(help="resize to this many pixels (bicubic)")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="its name or file; default: that of the run")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 on a GPU")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    batch_size: Annotated[int, typer.Option(help="images decoded at a time")] = 64,
    part_size: Annotated[int, typer.Option(help="images that a process samples before it writes them")] = 256,
    png: Annotated[bool, typer.Option("--png", help="write images/000000.png .. and labels.csv as well")] = False,
    out: Annotated[Path | None, typer.Option(help="folder; default: one in SOURCE/samples")] = None,
) -> None:
    """Sample images: grid.png, samples.npz for metrics, samples.json. Rerun the same command to resume.

    Several processes share the work: accelerate launch -m npp_ds sample ..., torchrun or srun.

    Example: npp sample runs/quickstart --classes sneaker,bag --cfg-scale 3
    """
    from npp_ds.checkpoint.open import open_weights
    from npp_ds.distributed.environment import choose_device, choose_dtype
    from npp_ds.sampling.image_model import find_tokenizer, parse_classes, split_classes, stage_warning
    from npp_ds.sampling.job import Request, Sampling, default_folder, image_count
    from npp_ds.sampling.logits_processing import Options

    process = read_environment()
    device = choose_device(device, process.local_rank)
    found = open_weights(source, step=step, variant=weights, n_heads=heads, grid_size=grid_size)
    decoder = find_tokenizer(found, tokenizer)
    wanted = split_classes(classes, found.class_names) if classes else None
    chosen = parse_classes(wanted, found.model.num_classes, found.class_names)
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
    folder = out or default_folder(found, request)
    job = Sampling(found, decoder, request, folder, device=device, batch_size=batch_size, png=png)
    if process.rank == 0:
        if not found.config:
            say(f"{source}: {found.describe()}")
        warn(found.guess_warning())
        warn(stage_warning(found, request.options))
    _run_sampling(job, process)


def _run_sampling(job: "Sampling", process: ProcessInfo) -> None:
    """Run the sampling of this process and print the result."""
    try:
        with Progress("sampling", shown=process.rank == 0) as progress, memory_advice("lower --batch-size"):
            sampled = job.run(process.rank, process.world_size, progress)
        record = job.finish()
    except OSError as error:
        text = f"{error.filename or job.out}: {error.strerror or error}"
        raise UserError(f"{text}; finished parts are kept; run the same command again") from error
    if record is None:
        say(f"process {process.rank} is done ({sampled} images); other processes are still running")
        return
    step = "" if record["checkpoint_step"] is None else f" of step {record['checkpoint_step']}"
    rate = "nothing was left to do"
    if sampled:
        rate = f"this process sampled {sampled} at {job.images_per_second:.3g} images/s"
    repeated = record["repeated_images"]
    say(
        f"{record['count']} images{step} in {job.out}: {rate}; "
        + (f"{repeated} are pixel for pixel equal to another one" if repeated else "no two are equal")
    )


def demo(
    source: Annotated[Path, typer.Argument(help="a run folder, an exported file or folder, a published checkpoint")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 7860,
    tokenizer: Annotated[str | None, typer.Option(help="its name or file; default: that of the run")] = None,
    step: Annotated[int | None, typer.Option(help="checkpoint; default: the newest complete one")] = None,
    weights: WeightsKind = "raw",
    heads: Heads = None,
    grid_size: GridSize = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 on a GPU")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Serve a page to this machine only, to sample by class, guidance and seed. Needs the extra `demo`.

    Example: npp demo runs/quickstart
    """
    try:
        from npp_ds.sampling.demo import serve
    except ModuleNotFoundError as error:
        raise UserError(f"npp demo needs {error.name}: pip install 'npp_ds[demo]' (starlette and uvicorn)") from None
    from npp_ds.sampling.image_model import load

    model = load(
        source,
        tokenizer=tokenizer,
        step=step,
        weights=weights,
        device=device,
        dtype=dtype,
        heads=heads,
        grid_size=grid_size,
    )
    serve(model, source, port)


def evaluate(
    context: typer.Context,
    source: Annotated[
        Path | None, typer.Argument(help="a run folder, whose newest samples are evaluated; with --sweep any weights")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="an .npz of statistics (ADM's, or our own) or of images, image shards, or a folder"),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="evaluate a folder of `npp sample`, an .npz, or a folder of images")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the result (with --sweep: its folder); default: beside the samples")
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="inception, fashion_mnist (the shipped classifier), or auto: that of the reference")
    ] = "auto",
    inception_weights: Annotated[
        Path | None, typer.Option(help="file of Inception's weights; default: download torch-fidelity's")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="centre-crop the reference's encoded images to this; with --sweep: samples' size"),
    ] = None,
    make_reference: Annotated[
        Path | None, typer.Option(help="only write the reference's statistics to this .npz")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="only check that reference and extractor fit the run")] = False,
    reconstruction: Annotated[
        str | None,
        typer.Option(
            help="evaluate --tokenizer on these images: reconstructions against --reference, by default against the "
            "originals"
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="sample and evaluate for each of cfg=1.5,1.75,2.0, checkpoint=1000,2000 or checkpoint=all"),
    ] = None,
    per_class: Annotated[int | None, typer.Option(help="with --sweep: images per class; default: 10")] = None,
    labels: Annotated[str, typer.Option(help="with --sweep: balanced or random")] = "balanced",
    cfg_scale: Annotated[float, typer.Option(help="with --sweep over checkpoints: scale of guidance")] = 1.0,
    seed: Annotated[int, typer.Option(help="with --sweep: random seed")] = 0,
    step: Annotated[int | None, typer.Option(help="with --sweep over cfg: checkpoint; default: the newest")] = None,
    weights: Annotated[str, typer.Option(help="with --sweep: raw or ema")] = "raw",
    patch_side: Annotated[
        int | None,
        typer.Option(min=1, help="with --sweep: patch side of the samples; default: that of each checkpoint's stage"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="tokenizer for --reconstruction or --sweep: name or file (--sweep default: the run's)"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="with --sweep: fp32, bf16, or auto: bf16 on a GPU")] = "auto",
    batch_size: Annotated[int, typer.Option(help="with --sweep: images decoded at a time")] = 64,
) -> None:
    """Compare samples with real images: FID, sFID, Inception score, precision, recall, class agreement.

    One process evaluates; several (accelerate launch, torchrun or srun) share the sampling of a sweep.

    Example: npp evaluate runs/xl_256 --reference VIRTUAL_imagenet256_labeled.npz
    """
    wanted = {
        "--make-reference": make_reference, "--reconstruction": reconstruction, "--check": check or None,
        "--sweep": sweep, "--samples": samples,
    }  # fmt: skip
    if len(given := [option for option, value in wanted.items() if value is not None]) > 1:
        raise UserError(f"found {' and '.join(given)}, expected one of them; run the command once for each")
    _check_sweep_options(context, sweep, reconstruction)
    process = read_environment()
    if process.rank and sweep is None:
        return
    if reference is None and reconstruction is None:
        raise UserError("--reference: missing; give ADM's .npz, statistics of --make-reference, or images")
    against = _Against(reference or str(reconstruction), extractor, inception_weights, image_size)
    if make_reference is not None:
        _make_reference(make_reference, against)
    elif reconstruction is not None:
        _evaluate_tokenizer(reconstruction, tokenizer, against, out)
    elif check:
        _check_reference(source, against)
    elif sweep is not None:
        if source is None:
            raise UserError("sweep: found no weights to sample; give a run folder")
        from npp_ds.evaluation.sweep import Settings, open_sweep
        from npp_ds.sampling.logits_processing import Options

        options = Options(seed=seed, cfg_scale=cfg_scale)
        settings = Settings(
            per_class, labels, options, step, weights, dtype, batch_size, image_size, tokenizer, patch_side
        )
        _sweep(open_sweep(source, sweep, settings, process.local_rank), process, against, out)
    else:
        _evaluate(source, samples, against, out)


SWEEP_OPTIONS = (
    "per_class", "labels", "cfg_scale", "seed", "step", "weights", "patch_side", "dtype", "batch_size", "tokenizer"
)  # fmt: skip


def _check_sweep_options(context: typer.Context, sweep: str | None, reconstruction: str | None) -> None:
    """Raise UserError for options that were given and have no effect."""
    sources = {name: context.get_parameter_source(name) for name in SWEEP_OPTIONS}
    given = {
        f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"
    }
    if sweep is None and (unused := sorted(given - ({"--tokenizer"} if reconstruction else set()))):
        raise UserError(
            f"{', '.join(unused)}: expected only with --sweep; samples that exist keep their settings, so give these "
            "to `npp sample`, and evaluate what it makes"
        )
    varied = {"cfg": "--cfg-scale", "checkpoint": "--step"}.get((sweep or "").partition("=")[0])
    if varied in given:
        raise UserError(f"{varied}: --sweep {sweep} varies it; give one of both")


@dataclass(frozen=True)
class _Against:
    """The options that say what samples are compared with."""

    reference: str
    extractor: str
    inception_weights: Path | None
    image_size: int | None

    def open_extractor(self, tokenizer: str | None) -> "Extractor":
        """Return the feature extractor; `tokenizer` is the name of the samples' own, if known."""
        from npp_ds.evaluation.evaluate import open_extractor

        return open_extractor(self.extractor, self.reference, tokenizer, self.inception_weights)

    def load(self, extractor: "Extractor") -> "Reference":
        from npp_ds.evaluation.evaluate import load_reference

        with Progress("reference") as progress:
            return load_reference(self.reference, extractor, self.image_size, progress)


def _make_reference(out: Path, against: _Against) -> None:
    from npp_ds.evaluation.evaluate import make_reference

    extractor = against.open_extractor(None)
    with Progress("reference") as progress:
        made = make_reference(out, against.reference, extractor, against.image_size, progress)
    say(f"{out}: statistics of {made.source.num_images} images by {extractor.name}")


def _check_reference(source: Path | None, against: _Against) -> None:
    from npp_ds.checkpoint.open import open_weights
    from npp_ds.evaluation.evaluate import check_reference

    tokenizer = open_weights(source).tokenizer if source else None
    extractor = against.open_extractor(tokenizer.name if tokenizer else None)
    check_reference(against.reference, extractor, against.image_size)
    say(f"{against.reference}: fit to compare with, by {extractor.name}")


def _evaluate(source: Path | None, samples: Path | None, against: _Against, out: Path | None) -> None:
    from npp_ds.evaluation.evaluate import result_file
    from npp_ds.evaluation.images import open_images
    from npp_ds.sampling.folder import newest_samples

    if samples is None:
        if source is None:
            raise UserError("nothing to evaluate: give a run folder, --samples, or --make-reference OUT.npz")
        samples = newest_samples(source)
    images = open_images(samples)
    _report(images, against, result_file(images.path, out))


def _report(images: "ImageSet", against: _Against, path: Path) -> None:
    """Evaluate images, print the result and write it to `path`."""
    from npp_ds.evaluation.evaluate import describe, evaluate_images, write_result

    extractor = against.open_extractor(images.record.get("tokenizer", {}).get("name"))
    reference = against.load(extractor)
    with Progress("samples") as progress:
        result = evaluate_images(images, reference, extractor, progress)
    say(*describe(result).splitlines())
    say(f"written to {write_result(result, path)}")


def _evaluate_tokenizer(images: str, tokenizer: str | None, against: _Against, out: Path | None) -> None:
    from npp_ds.distributed.environment import choose_device
    from npp_ds.evaluation.images import open_images, reconstructed
    from npp_ds.tokenizer.loading import load_tokenizer

    if tokenizer is None:
        raise UserError("--tokenizer: missing; give the name or file of the tokenizer that reconstructs the images")
    path = check_writable(out or Path("reconstruction.json"))
    found = open_images(images, against.image_size)
    _report(reconstructed(found, load_tokenizer(tokenizer), choose_device("auto", 0)), against, path)


def _sweep(sweep: "Sweep", process: ProcessInfo, against: _Against, out: Path | None) -> None:
    from npp_ds.evaluation.sweep import run_sweep, sample_share, table

    if process.rank:
        sample_share(sweep, process)
        return
    extractor = against.open_extractor(sweep.tokenizer.name)
    results, folder = run_sweep(sweep, against.load(extractor), extractor, out, Progress, process)
    say(*table(sweep.name, results).splitlines(), f"written to {folder}")


def likelihood(
    source: Annotated[Path, typer.Argument(help="a run folder, or a file of weights")],
    data: Annotated[str | None, typer.Option(help="held-out code shards; default: those of the run (data.val)")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="images, evenly spread over the set; default: all")] = None,
    patch_side: Annotated[int, typer.Option(min=1, help="side of the patches that codes are grouped into")] = 1,
    weights: WeightsKind = "raw",
    step: Annotated[int | None, typer.Option(help="checkpoint; default: the newest complete one")] = None,
    precision: Annotated[str, typer.Option(help="of matrix products: fp32 or bf16")] = "fp32",
    out: Annotated[
        Path | None, typer.Option(help="the JSON; default: RUN/likelihood.json or FILE.likelihood.json")
    ] = None,
) -> None:
    """Evaluate held-out codes: nats per code, bits per image, accuracy, and a picture of where the model is unsure.

    Example: npp likelihood runs/quickstart --limit 1000
    """
    if read_environment().rank:  # one process does it all
        return
    from npp_ds.checkpoint.open import open_weights
    from npp_ds.evaluation.likelihood import likelihood_of
    from npp_ds.reporting.plot import write_likelihood
    from npp_ds.utils.files import explain_os_errors

    opened = open_weights(source, step=step, variant=weights)
    shards = data or (opened.config.data.val if opened.config else None)
    if shards is None:
        raise UserError(f"--data: missing, and {source} names no held-out shards (data.val); give code shards")
    default = source / "likelihood.json" if source.is_dir() else source.with_suffix(".likelihood.json")
    path = check_writable(out or default)
    if path.suffix != ".json":
        raise UserError(f"--out: found {path}, expected a name that ends in .json; the picture is written beside it")
    cache_dir = opened.config.data.cache_dir if opened.config else None
    with Progress("measuring") as progress:
        result = likelihood_of(
            opened,
            shards,
            limit=limit,
            patch_side=patch_side,
            precision=precision,
            cache_dir=cache_dir,
            progress=progress,
        )
    with explain_os_errors(path):
        picture = write_likelihood(path, result)
    say(
        f"{result['images']} images at patch side {patch_side}: {result['nats_per_code']:.4f} nats per code, "
        f"{result['bits_per_image']:.1f} bits per image, top-1 {result['top1_accuracy']:.2%}, "
        f"top-5 {result['top5_accuracy']:.2%} ({precision}); {path}, {picture}"
    )
