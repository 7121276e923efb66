"""Descriptions of a set of code shards: its contents once it is made, its size and time before that."""

import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from npp_ds.data.manifest import Manifest
from npp_ds.data.shards import read_set, read_shard
from npp_ds.data.store import available_manifest, expand_variables, find_staged
from npp_ds.errors import UserError
from npp_ds.tokenizer.batches import BatchEncoder
from npp_ds.tokenizer.encode import Encoding
from npp_ds.tokenizer.vq import VQModel, to_uint8
from npp_ds.utils.files import nearest_folder
from npp_ds.utils.format import counted, format_bytes
from npp_ds.utils.screen import track

LISTED_CLASSES = 40
BAR = 40


@dataclass(frozen=True)
class Contents:
    """Statistics of a set: `code_counts` int64 [vocabulary] over all crops, `labels` int64 [images] in file order."""

    manifest: Manifest
    code_counts: np.ndarray
    labels: np.ndarray

    @property
    def class_counts(self) -> np.ndarray:
        """Images per class, int64 [num_classes]."""
        return np.bincount(self.labels, minlength=self.manifest.num_classes)

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes: the number of codes if all in use were equally frequent."""
        share = self.code_counts[self.code_counts > 0] / self.code_counts.sum()
        return float(np.exp(-(share * np.log(share)).sum()))

    @property
    def dead_codes(self) -> int:
        """Number of codes of the vocabulary that never occur."""
        return int((self.code_counts == 0).sum())

    def class_name(self, label: int) -> str:
        """Return the name of a class, or "class 3" if the set has no names."""
        names = self.manifest.class_names
        return names[label] if names else f"class {label}"


def read_contents(directory: str | Path, show_progress: bool = False) -> Contents:
    """Read and verify a whole set. Raises UserError at the first problem."""
    manifest = Manifest.load(directory)
    counts, labels = np.zeros(manifest.vocab_size, np.int64), []
    for codes, label in track(read_set(directory, manifest), "reading", manifest.num_samples, show_progress):
        counts += np.bincount(codes.ravel(), minlength=len(counts))
        labels.append(label)
    if not labels:
        raise UserError(f"{directory}: holds no images")
    return Contents(manifest, counts, np.array(labels, np.int64))


def describe(contents: Contents) -> list[str]:
    """Return lines of text for people: the manifest, the use of codes, and the images per class."""
    m = contents.manifest
    stored, source = sum(shard.bytes for shard in m.shards), m.source
    crops = f"{m.crops.scheme}{' ' + ' '.join(f'{r:g}' for r in m.crops.ranges) if m.crops.ranges else ''}"
    lines = [
        f"split        {m.split}",
        f"images       {m.num_samples:,} of {m.num_samples + len(m.skipped):,} ({len(m.skipped)} skipped), "
        f"{m.num_classes} classes",
        f"source       {source.get('kind', '?')}, {source.get('name', '?')}",
        f"crops        {m.num_crops} ({crops}) of {m.image_size} x {m.image_size} pixels",
        f"codes        {m.grid_size} x {m.grid_size} a crop, vocabulary {m.vocab_size:,}",
        f"tokenizer    {m.tokenizer.name}, SHA-256 {m.tokenizer.sha256 or 'not known'}",
        f"precision    {m.tokenizer.precision}" + (f" ({m.tokenizer.agreement})" if m.tokenizer.agreement else ""),
        f"shards       {len(m.shards)}, {compare_sizes(stored, source.get('bytes'))}",
        f"made by      {m.created_by}",
        f"code usage   perplexity {contents.perplexity:,.1f} of {m.vocab_size:,}; "
        f"{counted(contents.dead_codes, 'dead code')} ({contents.dead_codes / m.vocab_size:.1%})",
    ]
    lines += [f"skipped      {entry.get('path')}: {entry.get('reason')}" for entry in m.skipped[:5]]
    return lines + _class_lines(contents)


def compare_sizes(stored: int, images: int | None) -> str:
    """Return the size of code shards, compared with the bytes of the `images` they were made of, if those are known."""
    if not images or not stored:
        return format_bytes(stored)
    times = f"{images / stored:.1f} times less" if images > stored else f"{stored / images:.1f} times more"
    return f"{format_bytes(stored)}, {times} than the images' {format_bytes(images)}"


def _class_lines(contents: Contents) -> list[str]:
    """Return a bar per class; for many classes a histogram of their sizes, then the smallest and the largest."""
    counts = contents.class_counts
    lines = [f"classes      {counts.min():,} to {counts.max():,} images each, {(counts == 0).sum()} without any"]
    order = np.argsort(counts, kind="stable")
    shown = list(range(len(counts)))
    if len(counts) > LISTED_CLASSES:
        shown = [*order[:5], *order[-5:]]
        edges = np.unique(np.linspace(counts.min(), counts.max() + 1, 9).astype(int))
        totals = np.histogram(counts, edges)[0]
        for low, high, total in zip(edges[:-1], edges[1:], totals, strict=True):
            lines.append(f"{f'{low} to {high - 1} images':>24}  {_bar(total, totals.max())} {counted(total, 'class')}")
        lines.append("the smallest and the largest:")
    return lines + [
        f"{contents.class_name(c)[:18]:>18} {c:>5}  {_bar(counts[c], counts.max())} {counts[c]:,}" for c in shown
    ]


def _bar(value: int, largest: int) -> str:
    return "#" * -(-BAR * int(value) // max(int(largest), 1))


def random_codes(
    directory: str | Path, contents: Contents, classes: int, per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes int64 [n, tokens] and labels int64 [n] of random images.

    There are up to `per_class` images of each of `classes` random classes, and one random crop of each image.
    """
    rng = np.random.default_rng(seed)
    present = np.unique(contents.labels)
    rows: list[int] = []
    for label in sorted(rng.permutation(present)[:classes]):
        members = np.flatnonzero(contents.labels == label)
        rows += sorted(rng.permutation(members)[:per_class])
    crops = rng.integers(0, contents.manifest.num_crops, len(rows))
    codes = np.empty((len(rows), contents.manifest.num_tokens), np.int64)
    for position, values in _read_rows(Path(directory), contents.manifest, rows):
        codes[position] = values[crops[position]]
    return codes, contents.labels[rows]


def _read_rows(directory: Path, manifest: Manifest, rows: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (position in `rows`, codes [crops, tokens]) of each row, reading only the shards that have one."""
    first = 0
    for shard in manifest.shards:
        wanted = {row - first: position for position, row in enumerate(rows) if 0 <= row - first < shard.samples}
        if wanted:
            for number, (_, codes, _) in enumerate(read_shard(directory / shard.file)):
                if number in wanted:
                    yield wanted[number], codes
        first += shard.samples


def decode(tokenizer: VQModel, codes: np.ndarray, batch_size: int = 16) -> np.ndarray:
    """Return images uint8 [n, S, S, 3] of codes int64 [n, tokens]."""
    parts = (torch.from_numpy(codes[i : i + batch_size]) for i in range(0, len(codes), batch_size))
    return np.concatenate([to_uint8(tokenizer.decode(part)).numpy() for part in parts])


def evenly_spaced_codes(shard_dir: str | Path, cache_dir: str | Path | None, count: int) -> tuple[Manifest, np.ndarray]:
    """Return the manifest and codes int64 [n, tokens] of up to `count` evenly spaced images of a set: center crops.

    The network is not used. Raises UserError if the set is not on this machine, or damaged.
    """
    manifest = available_manifest(shard_dir, cache_dir)
    if manifest is None:
        raise UserError(f"{shard_dir}: these shards are not on this machine")
    rows = sorted({int(row) for row in np.linspace(0, manifest.num_samples - 1, count)})
    if store := find_staged(manifest, cache_dir):
        return manifest, store.codes[rows, manifest.crops.center].astype(np.int64)
    codes = np.empty((len(rows), manifest.num_tokens), np.int64)
    for position, values in _read_rows(Path(expand_variables(shard_dir)), manifest, rows):
        codes[position] = values[manifest.crops.center]
    return manifest, codes


@torch.no_grad()
def decode_patch_means(tokenizer: VQModel, codes: np.ndarray, patch_side: int) -> np.ndarray:
    """Return images uint8 [n, S, S, 3] of codes int64 [n, tokens], each code's vector replaced by its patch's mean."""
    grid = isqrt(codes.shape[1])
    vectors = tokenizer.quantize.vectors()[torch.from_numpy(codes).view(-1, grid, grid)].permute(0, 3, 1, 2)
    means = F.interpolate(F.avg_pool2d(vectors, patch_side), scale_factor=patch_side, mode="nearest")
    return to_uint8(tokenizer.reconstruct(means.permute(0, 2, 3, 1))).numpy()


def estimate(encoding: Encoding, processes: int, seconds: float = 10.0) -> str:
    """Return size and time of an encoding by `processes` processes, as text. Writes nothing.

    Measures for about `seconds`; longer if a single image takes longer.
    """
    settings, total = encoding.settings, len(encoding.source.items)
    crops, tokens = len(encoding.crop_names), encoding.identity["grid_size"] ** 2
    starts = range(0, total, settings.samples_per_shard)
    size = sum(shard_bytes(min(settings.samples_per_shard, total - start), crops, tokens) for start in starts)
    free = shutil.disk_usage(nearest_folder(encoding.out)).free
    text = (
        f"{total:,} images x {crops} crops x {tokens} codes: {encoding.shard_count} shards "
        f"({encoding.count_recorded()} finished) of {size:,} bytes in all "
        f"({compare_sizes(size, encoding.source.bytes)}); {format_bytes(free)} are free"
    )
    if size > free:
        text += ", TOO LITTLE"
    rate = _images_per_second(encoding, seconds)
    if not rate:
        return f"{text}\nno image could be read, so there is no rate"
    return (
        f"{text}\n{rate:.3g} images/s, {rate * crops:.3g} crops/s as measured in one process; "
        f"{total / rate / processes / 3600:.3g} hours for all images in {processes}"
    )


def shard_bytes(samples: int, crops: int, tokens: int) -> int:
    """Return the size of a shard file in bytes."""
    array = 128 + 2 * crops * tokens  # a .npy file with its header
    padded = -(-array // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    content = samples * (padded + 3 * tarfile.BLOCKSIZE) + 2 * tarfile.BLOCKSIZE
    return -(-content // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _images_per_second(encoding: Encoding, seconds: float) -> float:
    s, items = encoding.settings, encoding.source.items
    single = BatchEncoder(encoding.tokenizer, s.image_size, s.crops, s.crop_ranges, 1, s.device, s.precision)
    second_image = single.measure_rate(items, s.workers, seconds=0.0)
    slow = second_image and encoding.encoder.images / second_image > seconds
    return (single if slow else encoding.encoder).measure_rate(items, s.workers, seconds)
