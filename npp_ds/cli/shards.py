"""Commands about folders of code shards: verify, show."""

from pathlib import Path
from typing import Annotated

import typer

from npp_ds.errors import UserError

shards = typer.Typer(help="Look after folders of code shards.", no_args_is_help=True)


@shards.command()
def verify(directory: Annotated[Path, typer.Argument(help="folder with manifest.json")]) -> None:
    """Read every shard again: hashes, counts, keys, ranges of codes and labels; say which file is bad."""
    from npp_ds.data.shards import Manifest
    from npp_ds.data.shards import verify as find_problems

    if problems := find_problems(directory, show_progress=True):
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
    from npp_ds.sampling.grid import sample_grid
    from npp_ds.tokenizer import contents
    from npp_ds.tokenizer.loading import tokenizer_of
    from npp_ds.utils.files import write_atomic

    found = contents.read_contents(directory, show_progress=True)
    print("\n".join(contents.describe(found)), flush=True)
    codes, labels = contents.random_codes(directory, found, classes, per_class, seed)
    images = contents.decode(tokenizer_of(found.manifest.tokenizer, tokenizer), codes)
    picture = sample_grid(images, labels, found.manifest.class_names, per_row=per_class, max_rows=classes)
    path = out or directory / "contact_sheet.png"
    write_atomic(path, lambda file: picture.save(file, "PNG"))
    print(f"{path}: {len(labels)} random images of {len(set(labels.tolist()))} classes, each a random crop")
