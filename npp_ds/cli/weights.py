"""Commands about files of weights: export, import."""

from pathlib import Path
from typing import Annotated

import typer

from npp_ds.cli.common import GridSize, Heads, warn


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
    from npp_ds.checkpoint.export import export_weights
    from npp_ds.checkpoint.open import open_weights

    opened = open_weights(source, step=step, variant=weights, n_heads=heads, grid_size=grid_size, verify=True)
    export_weights(opened, out, layout=layout, dtype=dtype, force=force)
    print(f"{out}: {opened.describe()}")
    if layout == "safetensors":  # the published format has no place for a grid
        warn(opened.guess_warning())


def import_(
    file: Annotated[Path, typer.Argument(help="a published checkpoint, such as c2i_B_256.pt")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    heads: Heads = None,
    grid_size: GridSize = None,
    weights: Annotated[str, typer.Option(help="raw, or ema: their moving average")] = "raw",
    force: Annotated[bool, typer.Option("--force", help="replace a file that exists")] = False,
) -> None:
    """Turn a published LlamaGen or NPP checkpoint into a file for sampling, evaluation and further training."""
    from npp_ds.checkpoint.export import export_weights
    from npp_ds.checkpoint.open import open_weights

    opened = open_weights(file, variant=weights, n_heads=heads, grid_size=grid_size)
    export_weights(opened, out, force=force)
    print(f"{out}: {opened.describe()}")
    warn(opened.guess_warning())
