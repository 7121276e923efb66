"""Pictures of many images for people: a row per class with its name, or plain tiles."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP, FONT_SIZE = 8, 2, 15


def sample_grid(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] = (),
    per_row: int = 10,
    max_rows: int = 20,
    min_cell: int = 64,
) -> Image.Image:
    """Return an RGB picture of images uint8 [N, H, W, 3] with labels int [N].

    Each of the first `max_rows` classes, in the order of their numbers, has a row with its first `per_row` images.
    Images smaller than `min_cell` are enlarged by a whole factor without smoothing, so each pixel stays visible.
    """
    classes = np.unique(labels)[:max_rows]
    rows = [images[np.flatnonzero(labels == c)[:per_row]] for c in classes]
    names = [class_names[c] if c < len(class_names) else f"class {c}" for c in classes]
    height, width = images.shape[1:3]
    factor = max(1, -(-min_cell // min(height, width)))
    font = ImageFont.load_default(FONT_SIZE)
    left = MARGIN + int(max(font.getlength(name) for name in names)) + MARGIN
    step_x, step_y = width * factor + GAP, height * factor + GAP
    columns = max(len(row) for row in rows)
    picture = Image.new("RGB", (left + columns * step_x + MARGIN, 2 * MARGIN + len(rows) * step_y), "white")
    draw = ImageDraw.Draw(picture)
    for r, (name, row) in enumerate(zip(names, rows, strict=True)):
        top = MARGIN + r * step_y
        draw.text((left - MARGIN, top + step_y // 2), name, fill="black", font=font, anchor="rm")
        for c, image in enumerate(row):
            cell = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            picture.paste(cell, (left + c * step_x, top))
    return picture


def tiled(images: np.ndarray, per_row: int) -> Image.Image:
    """Return a picture of images uint8 [N, H, W, 3] side by side in their order; the rest of the last row is white."""
    count, height, width = images.shape[:3]
    picture = Image.new("RGB", (min(per_row, count) * width, -(-count // per_row) * height), "white")
    for i, image in enumerate(images):
        picture.paste(Image.fromarray(image), (i % per_row * width, i // per_row * height))
    return picture
