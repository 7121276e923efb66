"""Commands about files: export and import of weights, and folders of code shards."""

from pathlib import Path
from typing import Annotated

import typer

from npp_ds.cli.common import GridSize, Heads, WeightsKind, warn
from npp_ds.errors import UserError
from npp_ds.utils.logs import say


def export(
    source: Annotated[Path, typer.Argument(help="a run folder, or a file of weights")],
    out: Annotated[Path, typer.Option(help="the file to write: .safetensors, or .pt for the published format")],
    step: Annotated[int | None, typer.Option(help="checkpoint; default: the newest complete one")] = None,
    weights: WeightsKind = "raw",
    heads: Heads = None,
    grid_size: GridSize = None,
    layout: Annotated[
        str, typer.Option("--format", help="safetensors, or published: what the published sampling scripts load")
    ] = "safetensors",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
) -> None:
    """Write the weights of a run to one file, for sampling, for further training, or in the published format."""
    from npp_ds.checkpoint.export import export_weights
    from npp_ds.checkpoint.open import open_weights

    opened = open_weights(source, step=step, variant=weights, n_heads=heads, grid_size=grid_size, verify=True)
    export_weights(opened, out, layout=layout, dtype=dtype, force=force)
    say(f"{out}: {opened.describe()}")
    if layout == "safetensors":  # the published format does not store the grid size
        warn(opened.guess_warning())


def import_(
    file: Annotated[Path, typer.Argument(help="a published checkpoint, such as c2i_B_256.pt")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    heads: Heads = None,
    grid_size: GridSize = None,
    weights: WeightsKind = "raw",
    force: Annotated[bool, typer.Option("--force", help="replace an existing file")] = False,
) -> None:
    """Convert a published LlamaGen or NPP checkpoint to a file for sampling, evaluation and further training."""
    from npp_ds.checkpoint.export import export_weights
    from npp_ds.checkpoint.open import open_weights

    opened = open_weights(file, variant=weights, n_heads=heads, grid_size=grid_size)
    export_weights(opened, out, force=force)
    say(f"{out}: {opened.describe()}")
    warn(opened.guess_warning())


shards = typer.Typer(help="Verify and show folders of code shards.", no_args_is_help=True)


@shards.command()
def verify(directory: Annotated[Path, typer.Argument(help="folder with manifest.json")]) -> None:
    """Read every shard and check hashes, counts, keys, ranges of codes and labels; name each bad file."""
    from npp_ds.data.manifest import Manifest
    from npp_ds.data.shards import verify as find_problems

    if problems := find_problems(directory, show_progress=True):
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{directory}: {count}\n" + "\n".join(f"  - {p}" for p in problems))
    manifest = Manifest.load(directory)
    say(f"{directory}: {manifest.num_samples} images in {len(manifest.shards)} shards, all as the manifest says")


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
    """Show a set: its manifest, code usage, images per class, and a picture of random images by class."""
    from npp_ds.sampling.folder import sample_grid
    from npp_ds.tokenizer import contents
    from npp_ds.tokenizer.loading import tokenizer_of
    from npp_ds.utils.files import check_writable, explain_os_errors, write_atomic

    path = check_writable(out or directory / "contact_sheet.png")
    found = contents.read_contents(directory, show_progress=True)
    say(*contents.describe(found))
    codes, labels = contents.random_codes(directory, found, classes, per_class, seed)
    images = contents.decode(tokenizer_of(found.manifest.tokenizer, tokenizer), codes)
    picture = sample_grid(images, labels, found.manifest.class_names, per_row=per_class, max_rows=classes)
    with explain_os_errors(path):
        write_atomic(path, lambda file: picture.save(file, "PNG"))
    say(f"{path}: {len(labels)} random images of {len(set(labels.tolist()))} classes, each a random crop")
