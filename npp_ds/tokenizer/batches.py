"""Batches of crops through a tokenizer: one shape for all, cut and scaled to floats on the tokenizer's device."""

from collections.abc import Iterable, Iterator
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from npp_ds.errors import UserError
from npp_ds.tokenizer.crops import square_sides, windows
from npp_ds.tokenizer.decoding import Decoded
from npp_ds.tokenizer.sources import ImageItem
from npp_ds.tokenizer.vq import VQModel, to_input

Squares = list[np.ndarray]


class BatchEncoder:
    """Codes of batches of `images` images with all their crops."""

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
        """A batch takes at most `crops_per_batch` crops, and at least one image."""
        self.tokenizer, self.image_size, self.precision = tokenizer, image_size, precision
        self.device = torch.device(device)
        self.windows = windows(image_size, scheme, ranges)
        self.images = max(1, crops_per_batch // len(self.windows))
        shape = (self.images, len(self.windows), image_size, image_size, 3)
        self._crops = torch.empty(shape, device=self.device).permute(0, 1, 4, 2, 3)
        sides = square_sides(image_size, ranges)
        self._floats = [torch.empty((self.images, side, side, 3), device=self.device) for side in sides]
        pinned = self.device.type == "cuda"
        # Two sets, because one is filled while the other may still be on its way to the device.
        self._staging = cycle(
            [torch.empty((self.images, side, side, 3), dtype=torch.uint8, pin_memory=pinned).numpy() for side in sides]
            for _ in range(2)
        )

    def pack(self, results: Iterable[Decoded]) -> Iterator[tuple[list[ImageItem], Squares]]:
        """The readable images of `results` in batches of one shape, the last one padded; each is good until the batch
        after the next one is asked for."""
        kept, squares = [], next(self._staging)
        for result in results:
            start = 0
            while start < len(result.readable):
                stop = min(len(result.readable), start + self.images - len(kept))
                for whole, part in zip(squares, result.squares, strict=True):
                    whole[len(kept) : len(kept) + stop - start] = part[start:stop]
                kept += result.readable[start:stop]
                start = stop
                if len(kept) == self.images:
                    yield kept, squares
                    kept, squares = [], next(self._staging)
        if kept:
            for whole in squares:
                whole[len(kept) :] = 0
            yield kept, squares

    def encode(self, squares: Squares) -> Tensor:
        """Codes int64 [images, crops, tokens] of a batch, on the device, which may not be done with it yet."""
        staged = [torch.from_numpy(s).to(self.device, non_blocking=True) for s in squares]
        plain = [to_input(s, out) for s, out in zip(staged, self._floats, strict=True)]
        mirrored = [s.flip(-1) for s in plain] if any(w.mirrored for w in self.windows) else []
        size = self.image_size
        for number, w in enumerate(self.windows):
            square = (mirrored if w.mirrored else plain)[w.square]
            self._crops[:, number] = square[..., w.top : w.top + size, w.left : w.left + size]
        codes = self.tokenizer.encode(self._crops.flatten(0, 1), self.precision)
        return codes.view(self.images, len(self.windows), -1)

    def encode_all(
        self, batches: Iterable[tuple[list[ImageItem], Squares]]
    ) -> Iterator[tuple[list[ImageItem], np.ndarray]]:
        """(items, codes uint16 [items, crops, tokens]) of each batch; the device works one batch ahead."""
        under_way: list[tuple[list[ImageItem], Tensor]] = []
        for items, squares in batches:
            under_way.append((items, self.encode(squares)))
            if len(under_way) == 2:
                yield self._fetch(*under_way.pop(0))
        for waiting in under_way:
            yield self._fetch(*waiting)

    def _fetch(self, items: list[ImageItem], codes: Tensor) -> tuple[list[ImageItem], np.ndarray]:
        values = codes[: len(items)].to("cpu", torch.int32).numpy()
        if (bad := values.min((1, 2)) < 0).any():
            raise UserError(
                f"tokenizer {self.tokenizer.name}: in {self.precision} its encoder gives no finite numbers for "
                f"{items[bad.argmax()].where}; the checkpoint is damaged, or needs another precision"
            )
        return items, values.astype(np.uint16)
