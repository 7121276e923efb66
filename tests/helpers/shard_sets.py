"""Small sets of code shards for tests: random codes, one label per image, a manifest that agrees."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from npp_ds.data.manifest import CropInfo, Manifest, ShardInfo, TokenizerInfo
from npp_ds.data.shards import ShardWriter, shard_name

CROP_NAMES = ["top-left", "center", "center-flip"]


def manifest_of(shards: list[ShardInfo], **changes) -> Manifest:
    """A manifest of `shards`: 4x4 grid, vocabulary 1000, 10 classes, three crops; `changes` replace its fields."""
    fields = {
        "split": "train",
        "grid_size": 4,
        "vocab_size": 1000,
        "num_classes": 10,
        "class_names": [],
        "image_size": 16,
        "tokenizer": TokenizerInfo(name="random", sha256="0" * 64, downsample=4, precision="fp32"),
        "crops": CropInfo(scheme="ten", ranges=[1.1], names=CROP_NAMES),
        "num_samples": sum(shard.samples for shard in shards),
        "shards": shards,
        "source": {},
        "skipped": [],
    }
    return Manifest(**{**fields, **changes})


def random_set(num_samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """codes uint16 [images, 3, 16] below 1000 and labels int64 [images] below 10."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1000, (num_samples, len(CROP_NAMES), 16), dtype=np.uint16)
    return codes, rng.integers(0, 10, num_samples)


def write_set(directory: Path, num_samples: int, num_shards: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Writes `random_set(num_samples, seed)` as `num_shards` shards with a manifest; returns its codes and labels."""
    directory.mkdir(parents=True, exist_ok=True)
    codes, labels = random_set(num_samples, seed)
    infos = []
    for shard, rows in enumerate(np.array_split(np.arange(num_samples), num_shards)):
        with ShardWriter(directory / shard_name("train", shard)) as writer:
            for row in rows:
                writer.write(f"n{labels[row]:08d}/image_{row:05d}", codes[row], int(labels[row]))
        infos.append(writer.info)
    manifest_of(infos).save(directory)
    return codes, labels


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writing past `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
