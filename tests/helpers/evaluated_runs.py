"""Tiny runs whose samples are compared with real images while they train."""

from pathlib import Path
from typing import Any

import numpy as np

from image_sets import save_tiny_tokenizer, shipped_images
from npp_ds.config.schema import RunConfig
from npp_ds.data.manifest import TokenizerInfo
from npp_ds.data.shards import ShardWriter, shard_name
from npp_ds.evaluation.evaluate import make_reference
from npp_ds.evaluation.extractors import ClassifierExtractor
from npp_ds.utils.files import sha256
from runs import tiny_config
from shard_sets import CROP_NAMES, manifest_of

IMAGES, BATCH_SIZE = 12, 5


def images_to_evaluate_with(folder: Path) -> Path:
    """Writes tokenizer.safetensors, reference.npz of 32x32 images, and train/: 96 images of random codes, 8x8 each."""
    tokenizer = save_tiny_tokenizer(folder / "tokenizer.safetensors")
    (folder / "train").mkdir()
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "train" / shard_name("train", 0)) as writer:
        for row in range(96):
            codes = rng.integers(0, 64, (len(CROP_NAMES), 64), dtype=np.uint16)
            writer.write(f"n{row % 10:08d}/{row:05d}", codes, row % 10)
    made_by = TokenizerInfo(name=tokenizer.name, sha256=sha256(tokenizer), downsample=4, precision="fp32")
    manifest_of([writer.info], grid_size=8, vocab_size=64, image_size=32, tokenizer=made_by).save(folder / "train")
    np.savez(folder / "images.npz", arr_0=shipped_images(200)[0])
    make_reference(folder / "reference.npz", folder / "images.npz", ClassifierExtractor())
    return folder


def config_of(folder: Path, run_dir: Path, evaluate: dict[str, Any], **sections: Any) -> RunConfig:
    """Two stages (sides 2 and 1) of 6 steps each, evaluated on 12 images as `evaluate` says; `sections` change more."""
    usual = {"reference": str(folder / "reference.npz"), "images": IMAGES, "batch_size": BATCH_SIZE, "max_share": 1e9}
    data = {"train": str(folder / "train"), "tokenizer": str(folder / "tokenizer.safetensors"), "val": None}
    return tiny_config(
        folder,
        run_dir,
        model={"grid_size": 8, "vocab_size": 64},
        evaluate={**usual, **evaluate},
        data={**data, **sections.pop("data", {})},
        schedule={"patch_sides": [2, 1], "epochs": 2, "warmup_epochs": 0, **sections.pop("schedule", {})},
        **sections,
    )
