"""Real images to compare samples with, read from WebDataset image shards (png or jpg, with cls)."""

import glob
from pathlib import Path

import numpy as np

from npp_ds.errors import UserError
from npp_ds.tokenizer.listing import list_shards
from npp_ds.tokenizer.sources import decoded_images


def shard_paths(source: str | Path) -> list[str]:
    """The shards a file name, a pattern such as `images/val-*.tar.gz`, or a folder (all its tars) stands for, sorted.

    Raises UserError when there is none.
    """
    path = Path(source)
    patterns = [f"{path}/*.tar", f"{path}/*.tar.gz"] if path.is_dir() else [str(path)]
    found = sorted(file for pattern in patterns for file in glob.glob(pattern))
    if not found:
        raise UserError(f"{source}: no image shard found; give a .tar or .tar.gz file, a pattern or a folder of them")
    return found


def read_images(source: str | Path, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, H, W, 3], labels int64 [N]) of all shards in order, at most the first `limit`.

    Grey images get three equal channels. Raises UserError for a sample without image or label, for an image that
    cannot be read and for images of different sizes.
    """
    items = list_shards([Path(path) for path in shard_paths(source)])[:limit]
    images: list[np.ndarray] = []
    for item, image in decoded_images(items):
        images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            raise UserError(f"{item.where}: {image.width}x{image.height} pixels, expected those of the first image")
    return np.stack(images), np.array([item.label for item in items], dtype=np.int64)
