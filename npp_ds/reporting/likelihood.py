"""Write the result of `npp likelihood`: figures as JSON, and a picture of likelihood and accuracy by position."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from npp_ds.utils.files import write_atomic, write_json_atomic

MAPS = (
    ("nats_per_code", "nats per code", "magma"),
    ("top1_accuracy", "top-1 accuracy", "viridis"),
    ("top5_accuracy", "top-5 accuracy", "viridis"),
)
ANNOTATED = 8  # the most cells in a row that have space for their number


def likelihood_picture(result: dict[str, Any]) -> bytes:
    """Return a PNG with three maps of the image's patches, from the result of `evaluation.likelihood.likelihood_of`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, name, colours) in zip(figure.subplots(1, 3), MAPS, strict=True):
        values = np.array(result["by_position"][key])
        shares = key != "nats_per_code"
        shown = axis.imshow(values, cmap=colours)
        figure.colorbar(shown, ax=axis, shrink=0.8, format="{x:.0%}" if shares else "{x:.2f}")
        mean = f"{result[key]:.1%}" if shares else f"{result[key]:.4f}"
        axis.set_title(f"{name}, mean {mean}", fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
        if len(values) <= ANNOTATED:
            middle = (values.min() + values.max()) / 2
            for (row, column), value in np.ndenumerate(values):
                text = f"{value:.0%}" if shares else f"{value:.2f}"
                colour = "white" if value <= middle else "black"
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    weights = result["weights"]
    step = f", step {weights['step']:,}" if weights["step"] is not None else ""
    figure.suptitle(
        f"{weights['name']}{step} ({weights['kind']}), {result['images']:,} held-out images at patch side "
        f"{result['patch_side']}: {result['bits_per_image']:,.0f} bits per image",
        fontsize=12,
        fontweight="bold",
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def write_likelihood(path: Path, result: dict[str, Any]) -> Path:
    """Write the figures to `path` (JSON) and the picture beside it; return the picture's path."""
    picture = likelihood_picture(result)
    png = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(png, lambda file: file.write(picture))
    write_json_atomic(path, result)
    return png
