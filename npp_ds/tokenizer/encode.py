"""Encodes a source of images into shards of VQ codes, by any number of processes that share only the output folder.

Finished shards are kept when a run resumes, and the manifest is written last. A shard has a fixed range of the source,
and batches never cross shards, so its bytes depend neither on the number of processes nor on interruptions.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from npp_ds.data.manifest import MANIFEST_NAME, CodeAgreement, Manifest, ShardInfo, TokenizerInfo
from npp_ds.data.shards import ShardWriter, check_file, check_same_set, shard_name
from npp_ds.distributed.work_queue import LOCK_FILE, SETTINGS_FILE, WORK_FOLDER, WorkQueue
from npp_ds.errors import UserError
from npp_ds.tokenizer.batches import BatchEncoder, fitting_batch
from npp_ds.tokenizer.decoding import Decoded, DecodePool, Decoder, Task, tasks_of
from npp_ds.tokenizer.images import ImageItem, crop_names
from npp_ds.tokenizer.sources import Source
from npp_ds.tokenizer.vq import PRECISIONS, VQModel
from npp_ds.utils.files import locked, parse_json, read_small, write_json_atomic, write_text_atomic
from npp_ds.utils.format import counted
from npp_ds.utils.screen import ANY_RANK, Progress

logger = logging.getLogger(__name__)

AGREEMENT_FILE = "agreement.json"
SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True)
class EncodeSettings:
    """Settings of an encoding. At most `crop_batch_size` crops, but at least one image, are encoded at once.

    None stands for the number in the set that is in the folder, for a new set for what fits in the free memory.
    `workers` processes decode images; 0: this one does. `max_skipped` is a fraction of all images.
    """

    split: str
    image_size: int
    crops: str = "center"
    crop_ranges: tuple[float, ...] = ()
    samples_per_shard: int = 4096
    crop_batch_size: int | None = None
    max_skipped: float = 0.001
    device: str = "cpu"
    precision: str = "fp32"
    workers: int = 0


class FinishedShard(BaseModel):
    """The record of a shard, with its images that were skipped: key, path, reason and shard of each."""

    info: ShardInfo
    skipped: list[dict[str, Any]]


class Encoding:
    """The encoding of one source into one folder; every process that takes part calls `run`, then `finish`."""

    def __init__(self, source: Source, tokenizer: VQModel, out: str | Path, settings: EncodeSettings):
        """Raise UserError for impossible settings, and if `out` was made with other settings."""
        _check_settings(tokenizer, settings)
        self.source, self.tokenizer, self.out, self.settings = source, tokenizer, Path(out), settings
        self._described = source.describe()
        if settings.crop_batch_size is None:
            crops = fitting_batch(tokenizer, settings.image_size, settings.precision, settings.device)
            self.settings = replace(settings, crop_batch_size=crops)
        self._adopts_batch = settings.crop_batch_size is None
        self.work = self.out / WORK_FOLDER
        self.crop_names = crop_names(settings.crops, settings.crop_ranges)
        self.shard_count = -(-len(source.items) // settings.samples_per_shard)
        self._verified: dict[int, FinishedShard] = {}
        self._known: dict[int, FinishedShard] = {}
        self._check_folder()

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the manifest that must agree before shards of an earlier run are kept."""
        settings, tokenizer = self.settings, self.tokenizer
        crops = {"scheme": settings.crops, "ranges": list(settings.crop_ranges), "names": self.crop_names}
        batching = {"samples_per_shard": settings.samples_per_shard, "crops_per_batch": settings.crop_batch_size}
        return {
            "split": settings.split,
            "image_size": settings.image_size,
            "grid_size": settings.image_size // tokenizer.downsample,
            "vocab_size": tokenizer.config.codebook_size,
            "num_classes": self.source.num_classes,
            "class_names": self.source.class_names,
            "tokenizer": self._tokenizer_info().model_dump(),
            "crops": crops,
            "source": {**self._described, **batching},
        }

    def run(self, rank: int = 0, world_size: int = 1) -> int:
        """Encode the missing shards that no other process has taken; return the number of images encoded.

        Raises UserError if more than `max_skipped` of all images are unreadable, OSError if a shard cannot be written.
        """
        with locked(self.work / LOCK_FILE, create_folder=True):
            self.work.mkdir(exist_ok=True)  # `finish` removes it under this lock
            self._check_folder()  # again: another process may have started since
            if not (self.work / SETTINGS_FILE).is_file():
                write_json_atomic(self.work / SETTINGS_FILE, self.identity)
        self._poll()
        self._check_skipped()
        if rank == 0 and len(self._known) < self.shard_count:
            self._agreement()
        settings, encoded = self.settings, 0
        ahead = 2 * self.encoder.images
        with (
            WorkQueue(self.work, rank, world_size) as queue,
            DecodePool(settings.image_size, settings.crop_ranges, settings.workers, ahead) as pool,
            Progress("tokenizing", shown=rank == 0) as progress,
        ):
            self._show(progress, *self._counts())
            for shard, results in groupby(pool.map(self._tasks(queue)), key=lambda result: result.shard):
                self._encode_shard(shard, results, progress)
                queue.release(shard)
                encoded += len(self._items(shard))
                self._poll()
                self._check_skipped()
        return encoded

    def finish(self) -> Manifest | None:
        """Write skipped.jsonl and the manifest, unless other processes are still encoding: then return None."""
        if not all(map(self.finished, range(self.shard_count))):
            return None
        with locked(self.work / LOCK_FILE, create_folder=True):
            if any(self.work.glob("*.tar.json")) or self._earlier() is None:
                self._write_manifest()
            shutil.rmtree(self.work, ignore_errors=True)
        return Manifest.load(self.out)

    def finished(self, shard: int) -> FinishedShard | None:
        """Return the record of a shard if its file has the recorded size and hash, else None."""
        if shard not in self._verified:
            record = self._recorded(shard)
            if record is None or record.info.samples + len(record.skipped) != len(self._items(shard)):
                return None
            if check_file(self.out / self._name(shard), record.info):
                return None
            self._verified[shard] = record
        return self._verified[shard]

    def count_recorded(self) -> int:
        """Return the number of shards that are recorded as finished, without reading their files."""
        self._poll()
        return len(self._known)

    @cached_property
    def encoder(self) -> BatchEncoder:
        """The encoder of all batches, with its memory on the device."""
        s = self.settings
        assert s.crop_batch_size is not None
        return BatchEncoder(
            self.tokenizer, s.image_size, s.crops, s.crop_ranges, s.crop_batch_size, s.device, s.precision
        )

    def _tasks(self, queue: WorkQueue) -> Iterator[Task]:
        for shard in queue.take(self.shard_count, lambda shard: self.finished(shard) is not None):
            self._known.pop(shard, None)
            yield from tasks_of(shard, self._items(shard))

    def _encode_shard(self, shard: int, results: Iterable[Decoded], progress: Progress) -> None:
        name = self._name(shard)
        done, skipped_before = self._counts()
        for leftover in self.out.glob(f".{name}.*.tmp"):
            leftover.unlink()
        (self.work / f"{name}.json").unlink(missing_ok=True)
        skipped: list[dict[str, Any]] = []
        with ShardWriter(self.out / name) as writer:
            batches = self.encoder.pack(_collect_skipped(results, name, skipped))
            for items, codes in self.encoder.encode_all(batches):
                for item, row in zip(items, codes, strict=True):
                    writer.write(item.key, row, item.label)
                done += len(items)
                self._show(progress, done, skipped_before + len(skipped))
        record = FinishedShard(info=writer.info, skipped=skipped)
        write_json_atomic(self.work / f"{name}.json", record.model_dump())
        self._verified[shard] = self._known[shard] = record

    def _write_manifest(self) -> None:
        for leftover in self.out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        records = [self._verified[shard] for shard in range(self.shard_count)]
        self._known = dict(enumerate(records))
        self._check_skipped()
        skipped = self._skipped()
        shards = [record.info for record in records]
        fields = {**self.identity, "tokenizer": self._tokenizer_info(self._agreement())}
        if self.source.passed_over:
            fields["source"]["passed_over"] = self.source.passed_over
        manifest = Manifest(
            **fields, num_samples=sum(shard.samples for shard in shards), shards=shards, skipped=skipped
        )
        _write_skipped(self.out, skipped)
        manifest.save(self.out)

    def _tokenizer_info(self, agreement: CodeAgreement | None = None) -> TokenizerInfo:
        tokenizer = self.tokenizer
        return TokenizerInfo(
            name=tokenizer.name,
            sha256=tokenizer.sha256,
            downsample=tokenizer.downsample,
            precision=self.settings.precision,
            agreement=agreement,
        )

    def _agreement(self) -> CodeAgreement | None:
        """Compare the codes of the first batch with those of fp32. Measured and logged once for a set."""
        if self.settings.precision == "fp32":
            return None
        path = self.work / AGREEMENT_FILE
        with suppress(OSError, ValueError):  # absent, or damaged: measured again
            return CodeAgreement.model_validate_json(read_small(path))
        if (earlier := self._earlier()) and earlier.tokenizer.agreement:
            return earlier.tokenizer.agreement
        agreement = self._measure_agreement()
        logger.info(f"precision {self.settings.precision}: {agreement}", extra=ANY_RANK)
        write_json_atomic(path, agreement.model_dump())
        return agreement

    def _measure_agreement(self) -> CodeAgreement:
        decoder = Decoder(self.settings.image_size, self.settings.crop_ranges)
        batch = next(self.encoder.pack(decoder.map(tasks_of(0, self.source.items))), None)
        if batch is None:
            return CodeAgreement(images=0, codes=0, equal=0)
        codes = []
        for precision in ("fp32", self.settings.precision):
            self.encoder.precision = precision
            codes += [values for _, values in self.encoder.encode_all([batch])]
        return CodeAgreement(images=len(batch[0]), codes=codes[0].size, equal=int((codes[0] == codes[1]).sum()))

    def _recorded(self, shard: int) -> FinishedShard | None:
        """Read the record of a finished shard: from the work folder, or from the manifest once there is one."""
        name = self._name(shard)
        try:
            return FinishedShard.model_validate(parse_json(read_small(self.work / f"{name}.json")))
        except FileNotFoundError:
            earlier = self._earlier()
        except ValueError:  # damaged: the shard is made again
            return None
        found = [info for info in earlier.shards if info.file == name] if earlier else []
        if not earlier or not found:
            return None
        return FinishedShard(info=found[0], skipped=[entry for entry in earlier.skipped if entry["shard"] == name])

    def _earlier(self) -> Manifest | None:
        """Return the manifest in the folder, if there is one."""
        return Manifest.load(self.out) if (self.out / MANIFEST_NAME).is_file() else None

    def _poll(self) -> None:
        """Read the records of shards that any process has finished since the last call."""
        names = {path.name.removesuffix(".json") for path in self.work.glob("*.tar.json")}
        if earlier := self._earlier():
            names |= {info.file for info in earlier.shards}
        for shard in range(self.shard_count):
            wanted = shard not in self._known and self._name(shard) in names
            if wanted and (record := self._recorded(shard)):
                self._known[shard] = record

    def _counts(self) -> tuple[int, int]:
        """Return the number of images in the finished shards of all processes, and of the skipped ones among them."""
        return sum(len(self._items(shard)) for shard in self._known), len(self._skipped())

    def _show(self, progress: Progress, done: int, skipped: int) -> None:
        crops = counted(len(self.crop_names), "crop")
        facts = f"{crops} each, {len(self._known)}/{self.shard_count} shards, {skipped} skipped"
        progress(done, len(self.source.items), facts)

    def _skipped(self) -> list[dict[str, Any]]:
        return [entry for shard in sorted(self._known) for entry in self._known[shard].skipped]

    def _name(self, shard: int) -> str:
        return shard_name(self.settings.split, shard)

    def _items(self, shard: int) -> list[ImageItem]:
        start = shard * self.settings.samples_per_shard
        return self.source.items[start : start + self.settings.samples_per_shard]

    def _check_folder(self) -> None:
        """Raise UserError for shards made with other settings. Take the folder's batch size if none is given."""
        wanted = self.identity
        del wanted["crops"]["names"]  # they follow from scheme and ranges
        if self._adopts_batch:
            del wanted["source"]["crops_per_batch"]
        found = check_same_set(self.out, wanted)
        if self._adopts_batch and (crops := found.get("source", {}).get("crops_per_batch")):
            self.settings = replace(self.settings, crop_batch_size=crops)

    def _check_skipped(self) -> None:
        allowed, total, skipped = self.settings.max_skipped, len(self.source.items), self._skipped()
        if len(skipped) > round(allowed * total, 6):
            _write_skipped(self.out, skipped)
            for name in {entry["shard"] for entry in skipped}:  # a rerun tries their images again
                (self.work / f"{name}.json").unlink(missing_ok=True)
            raise UserError(
                f"{len(skipped)} of {total} images are unreadable so far, allowed are {allowed:.3%} (--max-skipped); "
                f"see {self.out / SKIPPED_FILE}; make them readable, or allow more, then rerun the same command; if "
                "files had to be changed or removed, with another --out"
            )


def _collect_skipped(results: Iterable[Decoded], shard: str, skipped: list[dict[str, Any]]) -> Iterator[Decoded]:
    """Yield the results and append their unreadable images to `skipped`."""
    for result in results:
        skipped += [
            {"key": item.key, "path": item.where, "reason": reason, "shard": shard}
            for item, reason in result.unreadable
        ]
        yield result


def _check_settings(tokenizer: VQModel, settings: EncodeSettings) -> None:
    if settings.image_size < 1 or settings.image_size % tokenizer.downsample:
        raise UserError(
            f"image size {settings.image_size}: expected a multiple of {tokenizer.downsample}, "
            f"the pixels per code of tokenizer {tokenizer.name}"
        )
    if tokenizer.config.codebook_size > 65536:
        raise UserError(
            f"tokenizer {tokenizer.name}: {tokenizer.config.codebook_size} codes; the shards hold 16 bits a code, "
            "expected at most 65536"
        )
    if settings.precision not in PRECISIONS:
        raise UserError(f"precision {settings.precision!r}: expected one of {', '.join(PRECISIONS)}")
    batch_size = settings.crop_batch_size
    if (
        settings.samples_per_shard < 1
        or (batch_size is not None and batch_size < 1)
        or not 0 <= settings.max_skipped <= 1
    ):
        raise UserError("expected samples per shard >= 1, batch size >= 1 and max skipped from 0 to 1")
    if settings.workers < 0:
        raise UserError(f"workers {settings.workers}: expected 0 or more")


def _write_skipped(out: Path, skipped: list[dict[str, Any]]) -> None:
    write_text_atomic(out / SKIPPED_FILE, "".join(json.dumps(entry) + "\n" for entry in skipped))
