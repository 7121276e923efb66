"""What an encoding will take, before it starts: shards, bytes, free disk, hours at a measured rate."""

import shutil
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from npp_ds.tokenizer.batches import BatchEncoder
from npp_ds.tokenizer.contents import compare_sizes
from npp_ds.tokenizer.decoding import DecodePool, tasks_of
from npp_ds.tokenizer.encode import Encoding
from npp_ds.utils.format import format_bytes


@dataclass(frozen=True)
class Estimate:
    """`bytes` of all shards, `free` on the disk they go to; `images_per_second` of one process, 0 when not known."""

    images: int
    image_bytes: int
    crops: int
    tokens: int
    shards: int
    finished_shards: int
    bytes: int
    free: int
    images_per_second: float
    processes: int

    def __str__(self) -> str:
        text = (
            f"{self.images:,} images x {self.crops} crops x {self.tokens} codes: "
            f"{self.shards} shards ({self.finished_shards} finished) of {self.bytes:,} bytes in all "
            f"({compare_sizes(self.bytes, self.image_bytes)}); {format_bytes(self.free)} are free"
        )
        if self.bytes > self.free:
            text += ", TOO LITTLE"
        if not self.images_per_second:
            return f"{text}\nno image could be read, so there is no rate"
        rate = self.images_per_second * self.processes
        return (
            f"{text}\n{self.images_per_second:.3g} images/s, {self.images_per_second * self.crops:.3g} crops/s as "
            f"measured in one process; {self.images / rate / 3600:.3g} hours for all images in {self.processes}"
        )


def estimate(encoding: Encoding, processes: int, seconds: float = 10.0) -> Estimate:
    """Writes nothing; measures for about `seconds`, longer when a single image takes longer."""
    settings, total = encoding.settings, len(encoding.source.items)
    crops, tokens = len(encoding.crop_names), encoding.identity["grid_size"] ** 2
    starts = range(0, total, settings.samples_per_shard)
    samples = [min(settings.samples_per_shard, total - start) for start in starts]
    return Estimate(
        images=total,
        image_bytes=encoding.source.bytes,
        crops=crops,
        tokens=tokens,
        shards=encoding.shard_count,
        finished_shards=encoding.count_recorded(),
        bytes=sum(shard_bytes(count, crops, tokens) for count in samples),
        free=shutil.disk_usage(_existing(encoding.out)).free,
        images_per_second=_measured_rate(encoding, seconds),
        processes=processes,
    )


def shard_bytes(samples: int, crops: int, tokens: int) -> int:
    """Return the size of a shard file in bytes."""
    array = 128 + 2 * crops * tokens  # a .npy file with its header
    padded = -(-array // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    content = samples * (padded + 3 * tarfile.BLOCKSIZE) + 2 * tarfile.BLOCKSIZE
    return -(-content // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _measured_rate(encoding: Encoding, seconds: float) -> float:
    """Images per second through decoding and encoding of the first images; 0 when none of them can be read."""
    s = encoding.settings
    single = BatchEncoder(encoding.tokenizer, s.image_size, s.crops, s.crop_ranges, 1, s.device, s.precision)
    second_image = _rate(encoding, single, seconds=0.0)
    slow = second_image and encoding.encoder.images / second_image > seconds
    return _rate(encoding, single if slow else encoding.encoder, seconds)


def _rate(encoding: Encoding, encoder: BatchEncoder, seconds: float) -> float:
    """Of the batches after the first one, which starts processes and devices, until `seconds` have passed; of that one
    when there are no others."""
    s = encoding.settings
    done, rate = 0, 0.0
    with DecodePool(s.image_size, s.crop_ranges, s.workers, ahead=2 * encoder.images) as pool:
        started = time.monotonic()
        batches = encoder.encode_all(encoder.pack(pool.map(tasks_of(0, encoding.source.items))))
        for number, (items, _) in enumerate(batches):
            done += len(items)
            elapsed = time.monotonic() - started
            rate = done / elapsed
            if number == 0:
                done, started = 0, time.monotonic()
            if number and elapsed > seconds:
                break
    return rate
