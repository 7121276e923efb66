"""Images -> shards of VQ codes, resumable: finished shards are kept, the manifest is written last.

A shard owns a fixed range of the source and batches never cross shards, so its bytes depend neither on the number of
processes nor on interruptions.
"""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from npp_ds.data.shards import MANIFEST_NAME, CropInfo, Manifest, ShardInfo, ShardWriter, TokenizerInfo, shard_name
from npp_ds.errors import UserError
from npp_ds.files import sha256, write_json_atomic, write_text_atomic
from npp_ds.tokenizer.crops import crop, crop_names
from npp_ds.tokenizer.progress import Progress
from npp_ds.tokenizer.sources import ImageItem, Source, read_images
from npp_ds.tokenizer.vq import VQModel, to_input

WORK_FOLDER = ".unfinished"
SKIPPED_FILE = "skipped.jsonl"
IDENTITY = ("split", "image_size", "tokenizer", "crops", "source")


@dataclass(frozen=True)
class EncodeSettings:
    """What to make of the images; at most `crop_batch_size` crops (at least one image) pass the tokenizer at once."""

    split: str
    image_size: int
    crops: str = "center"
    crop_ranges: tuple[float, ...] = ()
    samples_per_shard: int = 4096
    crop_batch_size: int = 256
    max_skipped: float = 0.001
    device: str = "cpu"


@dataclass(frozen=True)
class FinishedShard:
    info: ShardInfo
    skipped: list[dict]


class Encoding:
    """The encoding of one source into one folder: `run` on every process, then `finish` on one."""

    def __init__(self, source: Source, tokenizer: VQModel, out: str | Path, settings: EncodeSettings):
        """UserError for impossible settings, or when `out` was made with other ones."""
        _check_settings(tokenizer, settings)
        self.source, self.tokenizer, self.out, self.settings = source, tokenizer, Path(out), settings
        self.crop_names = crop_names(settings.crops, settings.crop_ranges)
        self.shard_count = -(-len(source.items) // settings.samples_per_shard)
        self.earlier = _earlier_manifest(self.out)
        self._check_folder()

    @cached_property
    def identity(self) -> dict:
        """The part of the manifest that must agree before shards of an earlier call are kept."""
        settings, tokenizer = self.settings, self.tokenizer
        info = TokenizerInfo(
            name=tokenizer.name, sha256=tokenizer.sha256, downsample=tokenizer.downsample, precision="fp32"
        )
        crops = CropInfo(scheme=settings.crops, ranges=list(settings.crop_ranges), names=self.crop_names)
        return {
            "split": settings.split,
            "image_size": settings.image_size,
            "tokenizer": info.model_dump(),
            "crops": crops.model_dump(),
            "source": {**self.source.describe(), "samples_per_shard": settings.samples_per_shard},
        }

    def run(self, rank: int = 0, world_size: int = 1) -> int:
        """Encodes what is missing of every `world_size`-th shard; returns the number of images encoded.

        UserError when more than `max_skipped` of all images are unreadable.
        """
        work = self.out / WORK_FOLDER
        work.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            write_json_atomic(work / "settings.json", self.identity)
        mine = range(rank, self.shard_count, world_size)
        finished = {shard: record for shard in mine if (record := self.finished(shard))}
        missing = [shard for shard in mine if shard not in finished]
        skipped = [entry for record in finished.values() for entry in record.skipped]
        total = sum(len(self._items(shard)) for shard in missing)
        with Progress(total, len(self.crop_names), shown=rank == 0) as progress:
            for shard in missing:
                record = self._encode_shard(shard, progress)
                skipped += record.skipped
                self._check_skipped(skipped)
        return total

    def finish(self) -> Manifest:
        """Writes `skipped.jsonl` and the manifest; all shards must be there."""
        records = [self.finished(shard) for shard in range(self.shard_count)]
        if None in records:
            raise UserError(f"{self.out}: shard {records.index(None)} is not finished; run the same command again")
        skipped = [entry for record in records for entry in record.skipped]
        self._check_skipped(skipped)
        shards = [record.info for record in records]
        manifest = Manifest(
            **self.identity,
            grid_size=self.settings.image_size // self.tokenizer.downsample,
            vocab_size=self.tokenizer.config.codebook_size,
            num_classes=self.source.num_classes,
            class_names=self.source.class_names,
            num_samples=sum(shard.samples for shard in shards),
            shards=shards,
            skipped=skipped,
        )
        _write_skipped(self.out, skipped)
        manifest.save(self.out)
        shutil.rmtree(self.out / WORK_FOLDER)
        for leftover in self.out.glob(f".{self.settings.split}-*.tmp"):
            leftover.unlink()
        return manifest

    def finished(self, shard: int) -> FinishedShard | None:
        """The record of a shard whose file is there with the recorded size and hash, else None."""
        name = shard_name(self.settings.split, shard)
        record = self._recorded(name)
        path = self.out / name
        if record is None or not path.is_file() or path.stat().st_size != record.info.bytes:
            return None
        return record if sha256(path) == record.info.sha256 else None

    def _recorded(self, name: str) -> FinishedShard | None:
        path = self.out / WORK_FOLDER / f"{name}.json"
        if path.is_file():
            record = json.loads(path.read_text())
            return FinishedShard(ShardInfo(**record["info"]), record["skipped"])
        for info in self.earlier.shards if self.earlier else ():
            if info.file == name:
                return FinishedShard(info, [entry for entry in self.earlier.skipped if entry["shard"] == name])
        return None

    def _items(self, shard: int) -> list[ImageItem]:
        start = shard * self.settings.samples_per_shard
        return self.source.items[start : start + self.settings.samples_per_shard]

    def _encode_shard(self, shard: int, progress: Progress) -> FinishedShard:
        name = shard_name(self.settings.split, shard)
        skipped: list[dict] = []
        with ShardWriter(self.out / name) as writer:
            for items, crops in self._batches(self._items(shard), name, skipped):
                for item, codes in zip(items, self._encode(crops), strict=False):
                    writer.write(item.key, codes, item.label)
                progress.advance(len(items))
        record = FinishedShard(writer.info, skipped)
        content = {"info": record.info.model_dump(), "skipped": record.skipped}
        write_json_atomic(self.out / WORK_FOLDER / f"{name}.json", content)
        return record

    def _batches(
        self, items: list[ImageItem], shard: str, skipped: list[dict]
    ) -> Iterator[tuple[list[ImageItem], np.ndarray]]:
        """Readable images and crops uint8 [images, crops, S, S, 3] in batches of one shape, the last one padded."""
        settings, count = self.settings, len(self.crop_names)
        shape = (max(1, settings.crop_batch_size // count), count, settings.image_size, settings.image_size, 3)
        kept, crops = [], np.zeros(shape, np.uint8)
        for item, data in read_images(items):
            try:
                image = _decode(data)
            except UserError as error:
                skipped.append({"key": item.key, "path": str(item.path), "reason": str(error), "shard": shard})
                continue
            crops[len(kept)] = crop(image, settings.image_size, settings.crops, settings.crop_ranges)
            kept.append(item)
            if len(kept) == len(crops):
                yield kept, crops
                kept, crops = [], np.zeros(shape, np.uint8)
        if kept:
            yield kept, crops

    def _encode(self, crops: np.ndarray) -> np.ndarray:
        """Codes uint16 [images, crops, tokens] of crops uint8 [images, crops, S, S, 3]."""
        images = torch.from_numpy(crops).flatten(0, 1).to(self.settings.device)
        codes = self.tokenizer.encode(to_input(images))
        return codes.to("cpu", torch.int32).numpy().astype(np.uint16).reshape(*crops.shape[:2], -1)

    def _check_folder(self) -> None:
        settings_file = self.out / WORK_FOLDER / "settings.json"
        if settings_file.is_file():
            found = json.loads(settings_file.read_text())
        elif self.earlier:
            found = {name: self.earlier.model_dump()[name] for name in IDENTITY}
        elif self.out.is_dir() and (tars := sorted(self.out.glob("*.tar"))):
            raise UserError(f"{self.out}: holds {tars[0].name} but no manifest; choose another folder or empty it")
        else:
            return
        if differences := list(_differences(found, self.identity)):
            raise UserError(
                f"{self.out}: made with other settings ({'; '.join(differences)}); choose another folder or empty it"
            )

    def _check_skipped(self, skipped: list[dict]) -> None:
        allowed, total = self.settings.max_skipped, len(self.source.items)
        if len(skipped) > allowed * total:
            _write_skipped(self.out, skipped)
            raise UserError(
                f"{len(skipped)} of {total} images are unreadable so far, allowed are {allowed:.3%} (--max-skipped); "
                f"see {self.out / SKIPPED_FILE}, mend or remove them, or allow more and run the same command again"
            )


def _check_settings(tokenizer: VQModel, settings: EncodeSettings) -> None:
    if settings.image_size < 1 or settings.image_size % tokenizer.downsample:
        raise UserError(
            f"image size {settings.image_size}: expected a multiple of {tokenizer.downsample}, "
            f"the pixels per code of tokenizer {tokenizer.name}"
        )
    if settings.samples_per_shard < 1 or settings.crop_batch_size < 1 or not 0 <= settings.max_skipped <= 1:
        raise UserError("expected samples per shard >= 1, batch size >= 1 and max skipped from 0 to 1")


def _earlier_manifest(out: Path) -> Manifest | None:
    return Manifest.load(out) if (out / MANIFEST_NAME).is_file() else None


def _decode(data: bytes) -> Image.Image:
    """RGB image of an encoded one; EXIF rotation is left alone, as the published pipeline does."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data
        raise UserError(str(error).replace("\n", " ") or type(error).__name__) from error


def _differences(found: dict, wanted: dict, prefix: str = "") -> Iterator[str]:
    for name in sorted(found.keys() | wanted.keys()):
        left, right = found.get(name), wanted.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}: it has {left!r}, asked for {right!r}"


def _write_skipped(out: Path, skipped: list[dict]) -> None:
    write_text_atomic(out / SKIPPED_FILE, "".join(json.dumps(entry) + "\n" for entry in skipped))
