"""Commands for files of weights: export, import."""

from pathlib import Path
from typing import Annotated

import typer

from npp_ds.cli.common import GridSize, Heads, WeightsKind, warn


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
    print(f"{out}: {opened.describe()}")
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
    print(f"{out}: {opened.describe()}")
    warn(opened.guess_warning())
