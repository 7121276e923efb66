"""Real images to compare samples with, read from WebDataset image shards (png or jpg, with cls)."""

import glob
import io
from pathlib import Path

import numpy as np

from npp_ds.errors import UserError
from npp_ds.tokenizer.sources import IMAGE_EXTENSIONS


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

    Grey images get three equal channels. Raises UserError for a sample without image or label and for images of
    different sizes.
    """
    from PIL import Image
    from webdataset import WebDataset

    images, labels = [], []
    for sample in WebDataset(shard_paths(source), shardshuffle=False):
        where = f"{sample['__url__']}, key {sample['__key__']}"
        data = next((sample[e] for e in IMAGE_EXTENSIONS if e in sample), None)
        if data is None or "cls" not in sample:
            found = ", ".join(k for k in sample if not k.startswith("__"))
            raise UserError(f"{where}: found {found}, expected an image ({', '.join(IMAGE_EXTENSIONS)}) and cls")
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        if images and image.shape != images[0].shape:
            raise UserError(f"{where}: {image.shape[1]}x{image.shape[0]} pixels, expected those of the first image")
        images.append(image)
        labels.append(int(sample["cls"]))
        if len(images) == limit:
            break
    return np.stack(images), np.array(labels, dtype=np.int64)
