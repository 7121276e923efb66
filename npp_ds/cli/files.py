"""Commands about files: export and import of weights, and folders of code shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npp_ds.cli.common import GridSize, Heads, WeightsKind, warn
from npp_ds.errors import UserError
from npp_ds.utils.format import counted
from npp_ds.utils.screen import say

if TYPE_CHECKING:
    from npp_ds.checkpoint.open import Weights


def export(
    source: Annotated[Path, typer.Argument(help="a run folder, or a file of weights")],
    out: Annotated[Path, typer.Option(help="the file to write: .safetensors, .pt (published), or a folder (hub)")],
    step: Annotated[int | None, typer.Option(help="checkpoint; default: the newest complete one")] = None,
    weights: WeightsKind = "raw",
    heads: Heads = None,
    grid_size: GridSize = None,
    layout: Annotated[
        str, typer.Option("--format", help="safetensors; published: for its sampling scripts; hub: for Hugging Face")
    ] = "safetensors",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    tokenizer: Annotated[
        str | None, typer.Option(help="of a hub folder: the tokenizer to include; default: that of a run, if available")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
) -> None:
    """Write the weights of a run to one file, for sampling, for further training, or in the published format.

    --format hub writes a folder with config.json, safetensors, tokenizer and a model card, for from_pretrained.

    Example: npp export runs/xl_256 --out xl_256.safetensors
    """
    from npp_ds.checkpoint.export import export_weights
    from npp_ds.checkpoint.open import open_weights

    opened = open_weights(source, step=step, variant=weights, n_heads=heads, grid_size=grid_size, verify=True)
    if layout == "hub":
        _export_hub(opened, out, dtype, force, tokenizer)
    elif tokenizer is not None:
        raise UserError(
            f"--tokenizer: found {tokenizer} with --format {layout}; only a hub folder includes a tokenizer"
        )
    else:
        export_weights(opened, out, layout=layout, dtype=dtype, force=force)
    say(f"{out}: {opened.describe()}")
    if layout == "safetensors":  # the published format does not store the grid size
        warn(opened.guess_warning())


def _export_hub(opened: "Weights", out: Path, dtype: str, force: bool, tokenizer: str | None) -> None:
    from npp_ds.checkpoint.export import export_hub
    from npp_ds.reporting.report import model_card
    from npp_ds.sampling.image_model import find_tokenizer

    try:
        decoder = find_tokenizer(opened, tokenizer)
    except UserError as error:
        if tokenizer is not None:
            raise
        decoder = None
        warn(f"{out} will hold no tokenizer ({error})")
    save = decoder.save_pretrained if decoder else None
    files = model_card(opened, out.name, decoder is not None)
    export_hub(opened, out, dtype=dtype, force=force, save_tokenizer=save, files=files)


def import_(
    file: Annotated[Path, typer.Argument(help="a published checkpoint, such as c2i_B_256.pt")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    heads: Heads = None,
    grid_size: GridSize = None,
    weights: WeightsKind = "raw",
    force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
) -> None:
    """Convert a published LlamaGen or NPP checkpoint to a file for sampling, evaluation and further training.

    Example: npp import c2i_B_256.pt --out c2i_B_256.safetensors
    """
    from npp_ds.checkpoint.export import export_weights
    from npp_ds.checkpoint.open import open_weights

    opened = open_weights(file, variant=weights, n_heads=heads, grid_size=grid_size)
    export_weights(opened, out, force=force)
    say(f"{out}: {opened.describe()}")
    warn(opened.guess_warning())


SHARDS_HELP = """Verify and show folders of code shards, and make them from LlamaGen's codes.

Example: npp shards verify data/imagenet_256/train
"""
shards = typer.Typer(help=SHARDS_HELP, no_args_is_help=True)


@shards.command()
def verify(directory: Annotated[Path, typer.Argument(help="folder with manifest.json")]) -> None:
    """Read every shard and check hashes, counts, keys, ranges of codes and labels; name each bad file.

    Example: npp shards verify data/imagenet_256/train
    """
    from npp_ds.data.manifest import Manifest
    from npp_ds.data.shards import verify as find_problems

    if problems := find_problems(directory, show_progress=True):
        raise UserError(f"{directory}: {counted(len(problems), 'problem')}\n" + "\n".join(f"  - {p}" for p in problems))
    manifest = Manifest.load(directory)
    found = f"{counted(manifest.num_samples, 'image')} in {counted(len(manifest.shards), 'shard')}"
    say(f"{directory}: {found}, all as the manifest says")


@shards.command("import-llamagen")
def import_llamagen(
    codes: Annotated[Path, typer.Argument(help="folder of 0.npy, 1.npy, .. such as imagenet256_codes")],
    labels: Annotated[Path, typer.Argument(help="folder of the labels, such as imagenet256_labels")],
    out: Annotated[Path, typer.Option(help="folder for the code shards and their manifest")],
    more_codes: Annotated[
        Path | None, typer.Option(help="a second folder of codes of the same images, with another crop range")
    ] = None,
    crop_range: Annotated[
        list[float] | None, typer.Option(help="of ten crops, once per folder; default: 1.1, of a second folder 1.05")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="the file that made the codes; without it the set's tokenizer is unknown")
    ] = None,
    class_list: Annotated[
        str | None, typer.Option(help="imagenet, or a file with one class name a line; default: no names")
    ] = None,
    split: Annotated[str, typer.Option(help="prefix of the shards")] = "train",
    vocab_size: Annotated[int | None, typer.Option(min=1, max=65536, help="default: 16384, or the tokenizer's")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="default: 1000, or those of the class list")] = None,
    downsample: Annotated[
        int | None, typer.Option(min=1, help="pixels per code; default: 16, or the tokenizer's")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="images per shard")] = 4096,
) -> None:
    """Turn codes that LlamaGen's or NPP's extract_codes_c2i.py wrote into a set of shards. Rerun to resume.

    Example: npp shards import-llamagen imagenet256_codes imagenet256_labels --out data/imagenet_256/train
    """
    from npp_ds.data.manifest import TokenizerInfo
    from npp_ds.tokenizer.listing import class_list_file, read_class_list
    from npp_ds.tokenizer.llamagen_codes import PRECISION, CodeFolders, CodeImport, ImportSettings

    name, sha256 = "unknown", ""
    if tokenizer is not None:
        from npp_ds.tokenizer.loading import load_tokenizer

        model = load_tokenizer(tokenizer)
        name, sha256 = model.name, model.sha256
        for option, given, its in (
            ("vocab-size", vocab_size, model.config.codebook_size),
            ("downsample", downsample, model.downsample),
        ):
            if given not in (None, its):
                raise UserError(f"--{option}: found {given}, but tokenizer {name} has {its}; leave the option out")
        vocab_size, downsample = model.config.codebook_size, model.downsample
    names = read_class_list(class_list_file(class_list), []) if class_list else []
    if num_classes and names and num_classes != len(names):
        raise UserError(f"--num-classes: found {num_classes}, but {class_list} has {len(names)} names")
    settings = ImportSettings(
        TokenizerInfo(name=name, sha256=sha256, downsample=downsample or 16, precision=PRECISION),
        split=split,
        vocab_size=vocab_size or 16384,
        num_classes=num_classes or len(names) or 1000,
        class_names=names,
        crop_ranges=tuple(crop_range or ((1.1, 1.05) if more_codes else (1.1,))),
        samples_per_shard=samples_per_shard,
    )
    folders = CodeFolders([codes, *([more_codes] if more_codes else [])], labels)
    manifest = CodeImport(folders, settings, out).run()
    of_each, shards_ = counted(manifest.num_crops, "crop"), counted(len(manifest.shards), "shard")
    say(f"{out}: {counted(manifest.num_samples, 'image')}, {of_each} each, {shards_}")
    if folders.repeated:
        say(f"{counted(folders.repeated, 'file')} at the end, equal to the first ones, left out")
    if not sha256:
        warn("which tokenizer made these codes is not recorded; give its file with --tokenizer to record it")


@shards.command()
def show(
    directory: Annotated[Path, typer.Argument(help="folder with manifest.json")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="its name or file; default: the shipped one, or the one in this folder"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the PNG; default: DIRECTORY/contact_sheet.png")] = None,
    classes: Annotated[int, typer.Option(min=1, max=50, help="rows of the picture")] = 12,
    per_class: Annotated[int, typer.Option(min=1, max=50, help="images in a row")] = 8,
    seed: Annotated[int, typer.Option(help="another seed shows other images")] = 0,
) -> None:
    """Show a set: its manifest, code usage, images per class, and a picture of random images by class.

    Example: npp shards show data/imagenet_256/train --tokenizer vq_ds16_c2i.pt
    """
    from npp_ds.data.manifest import Manifest
    from npp_ds.sampling.folder import sample_grid
    from npp_ds.tokenizer import contents
    from npp_ds.tokenizer.loading import tokenizer_of
    from npp_ds.utils.files import check_writable, explain_os_errors, write_atomic

    Manifest.load(directory)  # before a folder is made for the picture
    path = check_writable(out or directory / "contact_sheet.png")
    found = contents.read_contents(directory, show_progress=True)
    say(*contents.describe(found))
    codes, labels = contents.random_codes(directory, found, classes, per_class, seed)
    images = contents.decode(tokenizer_of(found.manifest.tokenizer, tokenizer), codes)
    picture = sample_grid(images, labels, found.manifest.class_names, per_row=per_class, max_rows=classes)
    with explain_os_errors(path):
        write_atomic(path, lambda file: picture.save(file, "PNG"))
    say(f"{path}: {len(labels)} random images of {len(set(labels.tolist()))} classes, each a random crop")
