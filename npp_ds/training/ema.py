"""The exponential moving average of the weights, kept by every rank for its own fp32 partitions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from npp_ds.training.partitions import Partitions

EMA = "ema"


class ShardedEMA:
    """ema <- decay * ema + (1 - decay) * weights after every update; it starts as a copy of the weights.

    `partitions` are fp32 tensors shaped like the masters, on their devices.
    """

    def __init__(self, weights: Partitions, decay: float):
        self._weights, self.decay = weights, decay
        self.partitions: list[Tensor] = [master.clone() for master in weights.masters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.partitions, self._weights.masters, 1 - self.decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the model computes with the averages; afterwards training goes on as if nothing had happened."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mine, master in zip(self.partitions, self._weights.masters, strict=True):
            kept = master.clone()
            master.copy_(mine)
            mine.copy_(kept)
        self._weights.publish()
