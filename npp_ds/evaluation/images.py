"""Open a set of images to measure: samples of `npp sample`, an .npz of images, image shards, or a folder of images."""

import glob
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npp_ds.distributed.work_queue import WORK_FOLDER
from npp_ds.errors import UserError
from npp_ds.sampling.folder import RECORD_FILE, SAMPLES_FILE, load_samples, map_array
from npp_ds.tokenizer.images import ImageItem, crop, decoded_images
from npp_ds.tokenizer.listing import PassedOver, extensions, image_files, log_passed_over, shortened
from npp_ds.tokenizer.sources import SHARD_SUFFIXES, file_item, list_shards

if TYPE_CHECKING:
    from npp_ds.tokenizer.vq import VQModel

IMAGES_KEY = "arr_0"
RECONSTRUCTION = "reconstruction"
RECONSTRUCTED_AT_A_TIME = 16


@dataclass(frozen=True)
class ImageSet:
    """`count` images of one size in a fixed order. `batches(n)` yields them as uint8 [<= n, H, W, 3].

    `labels` int64 [count] is None if unknown. `record` is the content of samples.json, empty for other images.
    `formats` are Pillow's names of the formats of encoded images, those that `batches` has read so far.
    """

    path: str
    kind: str
    count: int
    batches: Callable[[int], Iterator[np.ndarray]]
    labels: np.ndarray | None = None
    record: dict[str, Any] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)


def open_images(source: str | Path, image_size: int | None = None) -> ImageSet:
    """Open a folder of `npp sample`, an .npz file (`arr_0`), image shards, or a folder with images at any depth.

    Shards are given as a file, a pattern such as `val-*.tar.gz`, or a folder of them. The encoded images of shards and
    folders must have one size; with `image_size` they are centre-cropped to it as ADM does. samples.npz stands for its
    folder. Raises UserError if there is no image, and for samples that are not finished.
    """
    path = Path(source)
    if path.name == SAMPLES_FILE and (path.parent / RECORD_FILE).exists():
        path = path.parent
    _check_finished(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: a pipe or a device; expected a file or a folder")
    if path.suffix == ".npz":
        return _npz(path)
    if (path / RECORD_FILE).exists():
        images, labels, record = load_samples(path)
        return ImageSet(str(path), "samples", len(images), lambda n: _slices(images, n), labels, record)
    if path.is_dir() and not _shards(path):
        return _encoded(str(path), "folder", _listed(path), None, image_size)
    items = list_shards([Path(p) for p in shard_paths(source)], Counter())
    labels = np.array([item.label for item in items], dtype=np.int64)
    return _encoded(str(source), "shards", items, labels, image_size)


def reconstructed(images: ImageSet, tokenizer: "VQModel", device: str) -> ImageSet:
    """Return the images as a tokenizer reproduces them: encoded to codes and decoded, in fp32, rounded as samples are.

    Raises UserError, while they are read, for images whose sides are not multiples of the pixels per code.
    """
    import torch

    from npp_ds.tokenizer.vq import to_input, to_uint8

    tokenizer = tokenizer.to(device)

    def batches(n: int) -> Iterator[np.ndarray]:
        for batch in images.batches(n):
            size = batch.shape[1:3]
            if size[0] != size[1] or size[0] % tokenizer.downsample:
                raise UserError(
                    f"{images.path}: {size[1]}x{size[0]} pixels; {tokenizer.name} encodes squares whose side is a "
                    f"multiple of {tokenizer.downsample}; set --image-size to crop all images"
                )
            parts = torch.from_numpy(batch).to(device).split(RECONSTRUCTED_AT_A_TIME)
            decoded = [to_uint8(tokenizer.decode(tokenizer.encode(to_input(part)))) for part in parts]
            yield torch.cat(decoded).cpu().numpy()

    record = {"tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256}}
    return ImageSet(images.path, RECONSTRUCTION, images.count, batches, images.labels, record)


def _check_finished(path: Path) -> None:
    """Raise UserError for an unfinished folder of `npp sample`, and for its PNGs and its samples.npz."""
    for folder in (path, path.parent):
        stopped = (folder / WORK_FOLDER).exists() or (folder == path and (folder / SAMPLES_FILE).exists())
        if stopped and not (folder / RECORD_FILE).exists():
            raise UserError(f"{folder}: these samples are not finished; rerun the same `npp sample` to finish them")


def shard_paths(source: str | Path) -> list[str]:
    """Return the sorted shards of a file name, a pattern such as `images/val-*.tar.gz`, or a folder (all its tars).

    Raises UserError if there is none.
    """
    path = Path(source)
    found = _shards(path) if path.is_dir() else sorted(glob.glob(str(path)))
    if not found or not all(name.endswith(SHARD_SUFFIXES) for name in found):
        raise UserError(
            f"{source}: no images found; expected a folder that `npp sample` wrote, an .npz file, a folder of images, "
            "or image shards: a .tar or .tar.gz file, a pattern or a folder of them"
        )
    return found


def _shards(folder: Path) -> list[str]:
    return sorted(str(path) for suffix in SHARD_SUFFIXES for path in folder.glob(f"*{suffix}"))


def _listed(root: Path) -> list[ImageItem]:
    """Return every image below `root`, sorted by path. Links are followed."""
    passed_over: PassedOver = Counter()
    items = [file_item(root, parts, -1) for parts in image_files(root, "", passed_over)]
    log_passed_over(str(root), shortened(passed_over))
    if not items:
        raise UserError(f"{root}: no images found; expected {', '.join(sorted(extensions()))} at any depth, or shards")
    return sorted(items, key=lambda item: item.path)


def _encoded(
    path: str, kind: str, items: list[ImageItem], labels: np.ndarray | None, image_size: int | None
) -> ImageSet:
    formats: set[str] = set()

    def pixels() -> Iterator[np.ndarray]:
        first = None
        for item, image in decoded_images(items):
            formats.add(image.format or "")
            if image_size is not None and image.size != (image_size, image_size):
                found = crop(image, image_size, "center")[0]
            else:
                found = np.asarray(image)
            first = found if first is None else first
            if found.shape != first.shape:
                raise UserError(
                    f"{item.where}: {image.width}x{image.height} pixels, expected {first.shape[1]}x{first.shape[0]} as "
                    "the first image; set --image-size to crop all of them to one size"
                )
            yield found

    def batches(n: int) -> Iterator[np.ndarray]:
        batch: list[np.ndarray] = []
        for image in pixels():
            batch.append(image)
            if len(batch) == n:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    return ImageSet(path, kind, len(items), batches, labels, formats=formats)


def _slices(images: np.ndarray, n: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), n):
        yield np.asarray(images[start : start + n])


def _npz(path: Path) -> ImageSet:
    """Memory-map `arr_0` if it is uncompressed, so that 50,000 images need not fit in memory."""
    try:
        images = map_array(path, IMAGES_KEY)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no .npz file with images under {IMAGES_KEY!r} ({error})") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise UserError(f"{path}: {IMAGES_KEY} is {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 3]")
    return ImageSet(str(path), "npz", len(images), lambda n: _slices(images, n))
