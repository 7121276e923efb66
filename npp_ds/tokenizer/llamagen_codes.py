"""Folders of codes that LlamaGen's and NPP's `extract_codes_c2i.py` wrote, as a set of our shards.

Image i is `<codes>/<i>.npy`, integers [1, crops, tokens], and `<labels>/<i>.npy`, its label as [1]. Finished shards are
kept when an import resumes, and the manifest is written last.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from npp_ds.data.manifest import MANIFEST_NAME, CropInfo, Manifest, ShardInfo, TokenizerInfo
from npp_ds.data.shards import ShardWriter, check_file, check_same_set, shard_name
from npp_ds.distributed.work_queue import LOCK_FILE, SETTINGS_FILE, WORK_FOLDER
from npp_ds.errors import UserError
from npp_ds.tokenizer.images import crop_names
from npp_ds.utils.files import explain_os_errors, locked, parse_json, read_small, write_json_atomic
from npp_ds.utils.screen import Progress

INPUTS = "inputs"
CODES_IN_DIGEST = 8  # of each folder and shard
READERS = 16  # threads, since the time goes into opening small files
MOST_PADDING = 4096  # processes of an extraction
PRECISION = "tf32"  # the published script allows TF32 in products and convolutions
SCHEMES = {1: "center", 2: "center-flip"}


@dataclass(frozen=True)
class ImportSettings:
    """What the folders do not contain. `tokenizer` is that of the codes; its SHA-256 is "" if it is unknown.

    `crop_ranges` are those of ten crops, in the order of the folders. `class_names` may be empty.
    """

    tokenizer: TokenizerInfo
    split: str = "train"
    vocab_size: int = 16384
    num_classes: int = 1000
    class_names: Sequence[str] = ()
    crop_ranges: Sequence[float] = (1.1,)
    samples_per_shard: int = 4096


class CodeFolders:
    """Codes and labels of the same images; several folders of codes hold the crops at several ranges.

    Raises UserError for folders that are incomplete or do not belong together.
    """

    def __init__(self, codes: Sequence[Path], labels: Path):
        self.codes, self.labels = list(codes), labels
        counts = [_count(folder) for folder in (*self.codes, labels)]
        if len(self.codes) == 1 and counts[0] != counts[1]:
            raise UserError(
                f"{codes[0]} has {counts[0]:,} files, {labels} has {counts[1]:,}; expected one each per image"
            )
        kept = [n - self._padding(folder, n) for folder, n in zip(self.codes, counts, strict=False)]
        if len(set(kept)) > 1 or kept[0] > counts[-1]:
            found = ", ".join(f"{n:,} in {folder}" for n, folder in zip(kept, self.codes, strict=True))
            raise UserError(f"found {found} and {counts[-1]:,} in {labels}; expected as many images in each")
        self.count, self.repeated = kept[0], counts[0] - kept[0]
        self.crops, self.tokens = zip(*(self._shape(folder) for folder in self.codes), strict=True)

    def read(self, image: int) -> tuple[np.ndarray, int]:
        """Return the codes int64 [crops, tokens] and the label of an image. Raises UserError for a bad file."""
        parts = []
        for folder, crops, tokens in zip(self.codes, self.crops, self.tokens, strict=True):
            path = _file(folder, image)
            found = _load(path)
            if found.shape != (1, crops, tokens):
                raise UserError(
                    f"{path}: shape {list(found.shape)}, expected {[1, crops, tokens]} as in 0.npy; extract it again"
                )
            parts.append(found[0])
        path = _file(self.labels, image)
        label = _load(path)
        if label.size != 1:
            raise UserError(f"{path}: shape {list(label.shape)}, expected a single label; extract it again")
        return np.concatenate(parts), int(label.reshape(()))

    def digest(self, images: range, readers: ThreadPoolExecutor) -> str:
        """Return a hash of the labels of some images and of codes evenly spaced among them; it tells other files."""
        spaced = images[:: -(-len(images) // CODES_IN_DIGEST)]
        files = [_file(self.labels, image) for image in images]
        files += [_file(folder, image) for folder in self.codes for image in spaced]
        found = hashlib.sha256()
        for content in readers.map(read_small, files):
            found.update(hashlib.sha256(content).digest())
        return found.hexdigest()[:16]

    def _shape(self, folder: Path) -> tuple[int, int]:
        path = _file(folder, 0)
        shape = _load(path).shape
        if len(shape) != 3 or shape[0] != 1 or not shape[1] or not shape[2] or isqrt(shape[2]) ** 2 != shape[2]:
            raise UserError(
                f"{path}: shape {list(shape)}, expected [1, crops, tokens] with a square number of tokens, as "
                "extract_codes_c2i.py writes class-conditional codes"
            )
        return shape[1], shape[2]

    def _padding(self, folder: Path, count: int) -> int:
        """Return how many files at the end repeat the first ones in order: the sampler of an extraction fills up.

        It does so to give each process as many images; the published training ignores these files.
        """
        first = _bytes(folder, 0)
        for start in range(max(count - MOST_PADDING, 1), count):
            same = _bytes(folder, start) == first
            if same and all(_bytes(folder, start + i) == _bytes(folder, i) for i in range(1, count - start)):
                return count - start
        return 0


class ImportedShard(BaseModel):
    """The record of a finished shard, and the digest of the files that it was made of."""

    info: ShardInfo
    inputs: str


class CodeImport:
    """The import of code folders into the folder `out`, which keeps the shards that an earlier start has finished."""

    def __init__(self, folders: CodeFolders, settings: ImportSettings, out: Path):
        self.folders, self.settings, self.out, self.work = folders, settings, out, out / WORK_FOLDER
        self.shard_count = -(-folders.count // settings.samples_per_shard)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The part of the manifest that must agree before shards of an earlier start are kept."""
        f, s = self.folders, self.settings
        grid = isqrt(f.tokens[0])
        return {
            "split": s.split,
            "grid_size": grid,
            "image_size": grid * s.tokenizer.downsample,
            "vocab_size": s.vocab_size,
            "num_classes": s.num_classes,
            "class_names": list(s.class_names),
            "tokenizer": s.tokenizer.model_dump(),
            "crops": _crops(f, s.crop_ranges).model_dump(),
            "source": {
                "kind": "llamagen-codes",
                "name": f.codes[0].name,
                "images": f.count,
                "repeated": f.repeated,
                "samples_per_shard": s.samples_per_shard,
            },
        }

    @cached_property
    def _earlier(self) -> Manifest | None:
        """The manifest of a set that was complete before this import."""
        return Manifest.load(self.out) if (self.out / MANIFEST_NAME).is_file() else None

    def run(self) -> Manifest:
        """Write the shards and the manifest.

        Raises UserError for codes and labels out of range, and if `out` holds a set that was made otherwise.
        """
        check_same_set(self.out, self.identity)
        with explain_os_errors(self.out), locked(self.work / LOCK_FILE, patience=0, create_folder=True) as alone:
            if not alone:
                raise UserError(f"{self.out}: another process imports into it, or its disk has no file locks")
            write_json_atomic(self.work / SETTINGS_FILE, self.identity)
            with ThreadPoolExecutor(READERS) as readers, Progress("importing") as progress:
                made = [self._shard(number, readers, progress) for number in range(self.shard_count)]
            for leftover in self.out.glob(".*.tmp"):
                leftover.unlink()
            shards, inputs = [shard.info for shard in made], " ".join(shard.inputs for shard in made)
            keys = {**self.identity, "source": {**self.identity["source"], INPUTS: inputs}}
            if self._earlier and self._earlier.shards == shards:
                manifest = self._earlier  # it keeps its fingerprint, by which runs know it
            else:
                manifest = Manifest(**keys, num_samples=self.folders.count, shards=shards, skipped=[])
                manifest.save(self.out)
        shutil.rmtree(self.work)
        return manifest

    def _shard(self, number: int, readers: ThreadPoolExecutor, progress: Progress) -> ImportedShard:
        path = self.out / shard_name(self.settings.split, number)
        record = self.work / f"{path.name}.json"
        start = number * self.settings.samples_per_shard
        images = range(start, min(start + self.settings.samples_per_shard, self.folders.count))
        inputs = self.folders.digest(images, readers)
        info = self._finished(path, record, number, inputs)
        if info is None:
            with ShardWriter(path) as writer:
                for image, (codes, label) in zip(images, self._read(images, readers), strict=True):
                    writer.write(f"{image:08d}", codes, label)
                    progress(image, self.folders.count, f"shard {number + 1} of {self.shard_count}")
            info = writer.info
            write_json_atomic(record, ImportedShard(info=info, inputs=inputs).model_dump())
        progress(images.stop, self.folders.count, f"shard {number + 1} of {self.shard_count}")
        return ImportedShard(info=info, inputs=inputs)

    def _finished(self, path: Path, record: Path, number: int, inputs: str) -> ShardInfo | None:
        """Return the record of a shard if its file has the recorded size and hash, and was made of these inputs.

        Raises UserError if the set is complete and was made of others.
        """
        try:
            found = ImportedShard.model_validate(parse_json(read_small(record)))
        except FileNotFoundError:
            if self._earlier is None:
                return None
            known = str(self._earlier.source.get(INPUTS, "")).split()
            if known and known[number] != inputs:
                raise UserError(
                    f"{self.out}: holds shards of other labels or codes, {path.name} among them; choose another folder "
                    "with --out, or remove that one"
                ) from None
            listed = {shard.file: shard for shard in self._earlier.shards}
            found = ImportedShard(info=listed[path.name], inputs=inputs)
        except ValueError:
            return None
        return None if found.inputs != inputs or check_file(path, found.info) else found.info

    def _read(self, images: range, readers: ThreadPoolExecutor) -> Iterator[tuple[np.ndarray, int]]:
        f, s = self.folders, self.settings
        for image, (codes, label) in zip(images, readers.map(f.read, images), strict=True):
            _check_range(_file(f.codes[0], image), "code", codes, s.vocab_size, "the vocabulary (--vocab-size)")
            _check_range(_file(f.labels, image), "label", label, s.num_classes, "their number (--num-classes)")
            yield codes.astype(np.uint16), label


def _check_range(path: Path, what: str, values: np.ndarray | int, limit: int, advice: str) -> None:
    for value in (np.min(values), np.max(values)):
        if not 0 <= value < limit:
            raise UserError(f"{path}: {what} {value}, expected 0 to {limit - 1}; give {advice}, or extract it again")


def _crops(folders: CodeFolders, ranges: Sequence[float]) -> CropInfo:
    """Return the crops by their number per folder. Raises UserError if they are not those of the published script."""
    if len(set(folders.tokens)) > 1:
        raise UserError(f"found {' and '.join(map(str, folders.tokens))} tokens; expected folders of one image size")
    total = sum(folders.crops)
    if len(folders.codes) == 1 and total in SCHEMES:
        return CropInfo(scheme=SCHEMES[total], ranges=[], names=crop_names(SCHEMES[total]))
    if total != 10 * len(ranges) or any(crops % 10 for crops in folders.crops):
        found = " and ".join(map(str, folders.crops))
        raise UserError(
            f"{folders.codes[0]}: {found} crops an image and {len(ranges)} crop ranges, expected 1 crop, 2 (with its "
            "mirror image), or ten per --crop-range"
        )
    return CropInfo(scheme="ten", ranges=list(ranges), names=crop_names("ten", ranges))


def _file(folder: Path, image: int) -> Path:
    return folder / f"{image}.npy"


def _bytes(folder: Path, image: int) -> bytes:
    return read_small(_file(folder, image))


def _count(folder: Path) -> int:
    """Return the number of files 0.npy, 1.npy, .. in a folder. Raises UserError if one is missing."""
    try:
        names = [name.removesuffix(".npy") for name in os.listdir(folder) if name.endswith(".npy")]
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; expected a folder of extract_codes_c2i.py, such as imagenet256_codes"
        ) from None
    numbers = {int(name) for name in names if name.isdecimal()}
    missing = [str(i) for i in range(len(numbers)) if i not in numbers]
    if missing or not numbers:
        found = f"{missing[0]}.npy is missing among {len(numbers):,} numbered files" if missing else "holds no 0.npy"
        largest = f" (up to {max(numbers)}.npy)" if numbers else ""
        raise UserError(f"{folder}: {found}{largest}; finish the extraction, or copy the rest")
    return len(numbers)


def _load(path: Path) -> np.ndarray:
    try:
        found = np.load(io.BytesIO(read_small(path)), allow_pickle=False)
    except (OSError, ValueError, EOFError, TypeError, ArithmeticError, MemoryError) as error:
        raise UserError(f"{path}: unreadable ({error}); extract it again, or copy it again") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu":
        kind = found.dtype if isinstance(found, np.ndarray) else "an archive"
        raise UserError(f"{path}: {kind}, expected integers; extract it again")
    return found
