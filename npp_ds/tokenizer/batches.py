"""Batches of crops through a tokenizer: all of one shape, cut and converted to floats on the tokenizer's device."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from npp_ds.distributed.environment import free_memory, processes_on_node
from npp_ds.errors import UserError, memory_advice
from npp_ds.tokenizer.decoding import Decoded, DecodePool, tasks_of
from npp_ds.tokenizer.images import ImageItem, square_sides, windows
from npp_ds.tokenizer.vq import HALF_TYPES, VQConfig, VQModel, to_input

MOST_CROPS = 256
LIVE_TENSORS = 7
"""Tensors of the largest level of an encoder that may be in memory at once; 5 were measured on a CPU."""
Squares = list[np.ndarray]  # uint8 [images, side, side, 3] for each crop range


def bytes_per_crop(config: VQConfig, image_size: int, precision: str) -> int:
    """Return a bound of the memory in bytes that encoding takes for each crop of a batch."""
    elements = max(
        config.channels * multiplier * (image_size >> level) ** 2
        for level, multiplier in enumerate(config.channel_multipliers)
    )
    return LIVE_TENSORS * elements * (2 if precision in HALF_TYPES else 4)


def fitting_batch(tokenizer: VQModel, image_size: int, precision: str, device: str) -> int:
    """Return the largest power of two of crops, up to MOST_CROPS, that fits half of the free memory.

    Each process has a GPU of its own; those on one machine share its memory if they use none.
    """
    share = free_memory(device) // (2 if device.startswith("cuda") else 2 * processes_on_node())
    crops = share // bytes_per_crop(tokenizer.config, image_size, precision)
    return 1 << min(max(crops, 1), MOST_CROPS).bit_length() - 1


class BatchEncoder:
    """Encodes batches of `images` images, each with all its crops."""

    def __init__(
        self,
        tokenizer: VQModel,
        image_size: int,
        scheme: str,
        ranges: tuple[float, ...],
        crops_per_batch: int,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ):
        """A batch has at most `crops_per_batch` crops, but at least one image."""
        self.tokenizer, self.precision = tokenizer, precision
        self.image_size, self.ranges = image_size, ranges
        self.device = torch.device(device)
        self.windows = windows(image_size, scheme, ranges)
        self.images = max(1, crops_per_batch // len(self.windows))
        with self._memory_advice():
            self._allocate()

    def _allocate(self) -> None:
        image_size = self.image_size
        shape = (self.images, len(self.windows), image_size, image_size, 3)
        self._crops = torch.empty(shape, device=self.device).permute(0, 1, 4, 2, 3)
        sides = square_sides(image_size, self.ranges)
        self._floats = [torch.empty((self.images, side, side, 3), device=self.device) for side in sides]
        pinned = self.device.type == "cuda"
        # Two sets: one is filled while the other may still be copied to the device.
        self._staging = cycle(
            [torch.empty((self.images, side, side, 3), dtype=torch.uint8, pin_memory=pinned).numpy() for side in sides]
            for _ in range(2)
        )

    def _memory_advice(self) -> AbstractContextManager[None]:
        return memory_advice(
            f"{self.device} encodes {self.images * len(self.windows)} crops of {self.image_size} pixels at once; lower "
            "--batch-size, for a set that was begun with this one with another --out"
        )

    def pack(self, results: Iterable[Decoded]) -> Iterator[tuple[list[ImageItem], Squares]]:
        """Yield the readable images of `results` in batches of one shape; the last one is padded with zeros.

        The memory of a batch is used again for the batch after the next one.
        """
        items: list[ImageItem] = []
        squares = next(self._staging)
        for result in results:
            start = 0
            while start < len(result.readable):
                stop = min(len(result.readable), start + self.images - len(items))
                for batch, part in zip(squares, result.squares, strict=True):
                    batch[len(items) : len(items) + stop - start] = part[start:stop]
                items += result.readable[start:stop]
                start = stop
                if len(items) == self.images:
                    yield items, squares
                    items, squares = [], next(self._staging)
        if items:
            for batch in squares:
                batch[len(items) :] = 0
            yield items, squares

    def encode(self, squares: Squares) -> Tensor:
        """Return codes int64 [images, crops, tokens] of a batch on the device, which may still be computing them."""
        with self._memory_advice():
            staged = [torch.from_numpy(s).to(self.device, non_blocking=True) for s in squares]
            plain = [to_input(s, out) for s, out in zip(staged, self._floats, strict=True)]
            mirrored = [s.flip(-1) for s in plain] if any(w.mirrored for w in self.windows) else []
            size = self.image_size
            for number, w in enumerate(self.windows):
                square = (mirrored if w.mirrored else plain)[w.square]
                self._crops[:, number] = square[..., w.top : w.top + size, w.left : w.left + size]
            return self.tokenizer.encode(self._crops.flatten(0, 1), self.precision).view(
                self.images, len(self.windows), -1
            )

    def encode_all(
        self, batches: Iterable[tuple[list[ImageItem], Squares]]
    ) -> Iterator[tuple[list[ImageItem], np.ndarray]]:
        """Yield (items, codes uint16 [items, crops, tokens]) of each batch; the device works one batch ahead."""
        pending: list[tuple[list[ImageItem], Tensor]] = []
        for items, squares in batches:
            pending.append((items, self.encode(squares)))
            if len(pending) == 2:
                yield self._fetch(*pending.pop(0))
        for items, codes in pending:
            yield self._fetch(items, codes)

    def _fetch(self, items: list[ImageItem], codes: Tensor) -> tuple[list[ImageItem], np.ndarray]:
        values = codes[: len(items)].to("cpu", torch.int32).numpy()
        if (bad := values.min((1, 2)) < 0).any():
            raise UserError(
                f"tokenizer {self.tokenizer.name}: in {self.precision} its encoder gives no finite numbers for "
                f"{items[bad.argmax()].where}; the checkpoint is damaged, or needs another precision"
            )
        return items, values.astype(np.uint16)

    def measure_rate(self, items: list[ImageItem], workers: int, seconds: float) -> float:
        """Return the images per second of decoding and encoding the first items, 0 if none of them can be read.

        The first batch starts processes and devices, so the rate is that of the batches after it, until `seconds` have
        passed; it is that of the first batch if there is no other.
        """
        done, rate = 0, 0.0
        with DecodePool(self.image_size, self.ranges, workers, ahead=2 * self.images) as pool:
            started = time.monotonic()
            for number, (encoded, _) in enumerate(self.encode_all(self.pack(pool.map(tasks_of(0, items))))):
                done += len(encoded)
                elapsed = time.monotonic() - started
                rate = done / elapsed
                if number == 0:
                    done, started = 0, time.monotonic()
                elif elapsed > seconds:
                    break
        return rate
