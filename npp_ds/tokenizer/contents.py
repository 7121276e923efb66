"""What a set of code shards holds, for eyes: its manifest, the use of codes and classes, images of a few codes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npp_ds.data.shards import Manifest, read_set, read_shard
from npp_ds.errors import UserError
from npp_ds.utils.format import format_bytes
from npp_ds.utils.progress import track

LISTED_CLASSES = 40
BAR = 40


@dataclass(frozen=True)
class Contents:
    """`code_counts` int64 [vocabulary] over all crops, `labels` int64 [images] in file order."""

    manifest: Manifest
    code_counts: np.ndarray
    labels: np.ndarray

    @property
    def class_counts(self) -> np.ndarray:
        """Images per class, int64 [num_classes]."""
        return np.bincount(self.labels, minlength=self.manifest.num_classes)

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes: how many would be in use if all were used alike."""
        share = self.code_counts[self.code_counts > 0] / self.code_counts.sum()
        return float(np.exp(-(share * np.log(share)).sum()))

    @property
    def dead_codes(self) -> int:
        """Codes of the vocabulary that never occur."""
        return int((self.code_counts == 0).sum())

    def class_name(self, label: int) -> str:
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
    """Lines for a person."""
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
        f"tokenizer    {m.tokenizer.name}, SHA-256 {m.tokenizer.sha256}",
        f"precision    {m.tokenizer.precision}" + (f" ({m.tokenizer.agreement})" if m.tokenizer.agreement else ""),
        f"shards       {len(m.shards)}, {compare_sizes(stored, source.get('bytes'))}",
        f"made by      {m.created_by}",
        f"code usage   perplexity {contents.perplexity:,.1f} of {m.vocab_size:,}; {contents.dead_codes:,} dead codes "
        f"({contents.dead_codes / m.vocab_size:.1%})",
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
    """A bar per class, or for many classes their distribution, the smallest and the largest."""
    counts = contents.class_counts
    lines = [f"classes      {counts.min():,} to {counts.max():,} images each, {(counts == 0).sum()} without any"]
    order = np.argsort(counts, kind="stable")
    if len(counts) <= LISTED_CLASSES:
        shown = range(len(counts))
    else:
        shown = [*order[:5], *order[-5:]]
        edges = np.linspace(counts.min(), counts.max() + 1, 9).astype(int)
        edges = np.unique(edges)
        totals = np.histogram(counts, edges)[0]
        for low, high, total in zip(edges[:-1], edges[1:], totals, strict=True):
            lines.append(f"{f'{low} to {high - 1} images':>24}  {_bar(total, totals.max())} {total} classes")
        lines.append("the smallest and the largest:")
    return lines + [
        f"{contents.class_name(c)[:18]:>18} {c:>5}  {_bar(counts[c], counts.max())} {counts[c]:,}" for c in shown
    ]


def _bar(value: int, largest: int) -> str:
    return "#" * -(-BAR * int(value) // max(int(largest), 1))


def random_codes(
    directory: str | Path, contents: Contents, classes: int, per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(codes int64 [n, tokens], labels int64 [n]): of `classes` random classes up to `per_class` random images each,
    one random crop of every image."""
    rng = np.random.default_rng(seed)
    present = np.unique(contents.labels)
    rows: list[int] = []
    for label in sorted(rng.permutation(present)[:classes]):
        members = np.flatnonzero(contents.labels == label)
        rows += sorted(rng.permutation(members)[:per_class])
    crops = rng.integers(0, contents.manifest.num_crops, len(rows))
    codes = np.empty((len(rows), contents.manifest.num_tokens), np.int64)
    for target, values in _read_rows(Path(directory), contents.manifest, rows):
        codes[target] = values[crops[target]]
    return codes, contents.labels[rows]


def _read_rows(directory: Path, manifest: Manifest, rows: list[int]):
    """(position in `rows`, codes [crops, tokens]) of each, reading only the shards that hold one."""
    first = 0
    for shard in manifest.shards:
        wanted = {row - first: position for position, row in enumerate(rows) if 0 <= row - first < shard.samples}
        if wanted:
            for number, (_, codes, _) in enumerate(read_shard(directory / shard.file)):
                if number in wanted:
                    yield wanted[number], codes
        first += shard.samples


def decode(tokenizer, codes: np.ndarray, batch_size: int = 16) -> np.ndarray:
    """Images uint8 [n, S, S, 3] of codes int64 [n, tokens]."""
    import torch

    from npp_ds.tokenizer.vq import to_uint8

    parts = (torch.from_numpy(codes[i : i + batch_size]) for i in range(0, len(codes), batch_size))
    return np.concatenate([to_uint8(tokenizer.decode(part)).numpy() for part in parts])
