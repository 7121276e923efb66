"""Compare the rows of codes per second that the staged array delivers with those of common ways to read them.

Random codes are written as shards and as files. The readers take turns on one core, with all files in the page cache:

    python -m benchmarks.loader --out benchmarks/results
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import command_line, in_the_same_turn, machine, made_by, parsed, publish, rates_in_turn
from npp_ds.config.schedule import Stage
from npp_ds.data.loader import StageLoader
from npp_ds.data.manifest import CropInfo, Manifest, TokenizerInfo
from npp_ds.data.order import batch_ids, epoch_permutation
from npp_ds.data.shards import ShardWriter, shard_name
from npp_ds.data.store import CodeStore, stage

BATCH, GRID, VOCABULARY, CLASSES = 256, 16, 16384, 1000
GATHER, STREAM, FILES = "staged array, gather alone", "stock WebDataset, tar streaming", "one .npy file per image"
LOADER = {side: f"StageLoader, patch side {side}" for side in (1, 2, 4)}
RATIOS = {
    "loader_to_webdataset": (LOADER[1], STREAM),
    "loader_to_files": (LOADER[1], FILES),
    "gather_to_webdataset": (GATHER, STREAM),
}


def write_shards(folder: Path, codes: np.ndarray, labels: np.ndarray, shard_images: int) -> list[Path]:
    """Write a data set with one crop per image and `shard_images` images per shard. Return the shards' paths."""
    folder.mkdir()
    infos = []
    for start in range(0, len(codes), shard_images):
        with ShardWriter(folder / shard_name("train", len(infos))) as writer:
            for row in range(start, min(start + shard_images, len(codes))):
                writer.write(f"{row:08d}", codes[row, None], int(labels[row]))
        infos.append(writer.info)
    Manifest(
        split="train",
        grid_size=GRID,
        vocab_size=VOCABULARY,
        num_classes=CLASSES,
        class_names=[],
        image_size=GRID * 16,
        tokenizer=TokenizerInfo(name="random", sha256="0" * 64, downsample=16, precision="fp32"),
        crops=CropInfo(scheme="center", ranges=[], names=["center"]),
        num_samples=len(codes),
        shards=infos,
        source={},
        skipped=[],
    ).save(folder)
    return [folder / info.file for info in infos]


def write_files(folder: Path, codes: np.ndarray, labels: np.ndarray) -> None:
    """Write two files per image, int64 codes [1, crops, tokens] and label [1], as the published extraction does."""
    for name in ("codes", "labels"):
        (folder / name).mkdir(parents=True)
    for row in range(len(codes)):
        np.save(folder / "codes" / f"{row}.npy", codes[row, None, None].astype(np.int64))
        np.save(folder / "labels" / f"{row}.npy", labels[row, None])


def gather(store: CodeStore) -> int:
    """Read one epoch of shuffled batches of uint16 rows. Return the number of rows, as all readers here do."""
    rows = store.codes.reshape(len(store), -1)
    out = np.empty((BATCH, rows.shape[1]), np.uint16)
    steps = len(store) // BATCH
    for step in range(steps):
        np.take(rows, batch_ids(len(store), BATCH, 0, 0, step), axis=0, out=out, mode="clip")
    return steps * BATCH


def load(store: CodeStore, patch_side: int) -> int:
    """Read one epoch as the trainer does: shuffled, random crops, label dropout, grouped, prefetched, int64 tensors."""
    epoch_permutation.cache_clear()
    steps = len(store) // BATCH
    plan = Stage(
        index=0,
        patch_side=patch_side,
        start_step=0,
        end_step=steps,
        start_epoch=0,
        steps_per_epoch=steps,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        peak_learning_rate=1e-4,
        final_learning_rate=1e-5,
        warmup_steps=1,
        decay_steps=1,
    )
    options = {"seed": 0, "class_dropout": 0.1, "num_classes": CLASSES, "rank": 0, "world_size": 1, "first_step": 0}
    with StageLoader(store, plan, **options) as loader:
        return sum(len(labels) for batch in loader for _, labels in batch.micro_batches)


def stream(shards: list[Path]) -> int:
    """Read the same shards through stock WebDataset with a shuffle buffer, as int64 batches."""
    dataset = (
        webdataset.WebDataset([str(path) for path in shards], shardshuffle=len(shards))
        .shuffle(1000)
        .decode()
        .to_tuple("codes.npy", "cls")
        .batched(BATCH)
    )
    return sum(len(torch.from_numpy(codes.astype(np.int64))) for codes, _ in dataset)


class _FilePerImage(Dataset):
    """Reads the files of `write_files` with a random crop of each image, as the published training code does."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, label = (np.load(self.folder / name / f"{row}.npy") for name in ("codes", "labels"))
        crop = torch.randint(codes.shape[1], ()).item()
        return torch.from_numpy(codes[:, crop]), torch.from_numpy(label)


def read_files(folder: Path, count: int) -> int:
    """Read shuffled batches from a folder of `write_files`, in this process."""
    return sum(len(codes) for codes, _ in DataLoader(_FilePerImage(folder, count), BATCH, shuffle=True))


def run(folder: Path, images: int, subset: int, repeats: int) -> dict:
    """Write the data under `folder`, measure all readers, and return the result that is printed as JSON."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, VOCABULARY, (images, GRID**2), dtype=np.uint16)
    labels = rng.integers(0, CLASSES, images)
    shard_images = min(subset, 10_000)
    shards = write_shards(folder / "shards", codes, labels, shard_images)
    write_files(folder / "files", codes[:subset], labels[:subset])
    started = time.perf_counter()
    store = stage(folder / "shards", folder / "cache")
    staging_seconds = time.perf_counter() - started
    readers: dict[str, Callable[[], int]] = {GATHER: lambda: gather(store)}
    for side, name in LOADER.items():
        readers[name] = lambda side=side: load(store, side)
    readers[STREAM] = lambda: stream(shards[: subset // shard_images])
    readers[FILES] = lambda: read_files(folder / "files", subset)
    rates = rates_in_turn(readers, repeats)
    return {
        "benchmark": "loader",
        "images": images,
        "subset": subset,
        "repeats": repeats,
        "rows_per_second": {name: round(median(values)) for name, values in rates.items()},
        "range": {name: [round(min(values)), round(max(values))] for name, values in rates.items()},
        "staged_images_per_second": round(images / staging_seconds),
        "ratios": {n: round(in_the_same_turn(rates[a], rates[b])["median"], 1) for n, (a, b) in RATIOS.items()},
        "machine": machine("numpy", "torch", "webdataset"),
    }


def table(result: dict) -> str:
    lines = [
        "# Rows of 256 codes per second on one core",
        "",
        f"Batches of {BATCH}, warm, {result['images']:,} images with one crop each (for WebDataset and files "
        f"{result['subset']:,} of them); medians of {result['repeats']} turns.",
        "",
        "| reader | rows/s | lowest .. highest |",
        "|---|---|---|",
    ]
    for name, rate in result["rows_per_second"].items():
        low, high = result["range"][name]
        lines.append(f"| {name} | {rate:,} | {low:,} .. {high:,} |")
    lines += [
        "",
        "StageLoader is what the trainer iterates over. It includes the epoch's permutation, crops, labels, grouping "
        "and int64 tensors, and its thread shares the core with its consumer. All readers but the gather return int64 "
        "batches. Verifying and unpacking the shards, once per node, processed "
        f"{result['staged_images_per_second']:,} images/s.",
        "",
        made_by(result),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__, fast="50,000 images, 4,096 of them for WebDataset and files", repeats=7)
    parser.add_argument("--images", type=int, default=200_000, help="images in the staged set")
    parser.add_argument("--subset", type=int, default=20_000, help="images for WebDataset and for files")
    args = parsed(parser, fast={"images": 50_000, "subset": 4096})
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), args.images, args.subset, args.repeats)
    result["fast"] = args.fast
    publish(result, table(result), args.out)


if __name__ == "__main__":
    main()
