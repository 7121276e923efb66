"""When a loss is a spike: far above what the last steps of the same stage have shown."""

import math
from collections import deque
from dataclasses import dataclass

RELATIVE_FLOOR = 1e-3
"""Smallest standard deviation, as a part of the mean: a loss that stands still does not make rounding a spike."""


@dataclass(frozen=True)
class Spike:
    """A loss, with the mean and the standard deviation of the losses that it stands out from."""

    loss: float
    mean: float
    std: float


class SpikeRule:
    """Finds losses of more than `threshold` standard deviations above the mean of the last `window` ones of the stage.

    The first `window // 2` losses of a stage are taken as they come. Spikes do not enter the window. A window of 0
    finds none.
    """

    def __init__(self, window: int, threshold: float):
        self.window, self.threshold = window, threshold
        self._stage: int | None = None
        self._losses: deque[float] = deque(maxlen=window)

    def observe(self, stage: int, loss: float) -> Spike | None:
        """The spike that the next loss of `stage` is, or None. Losses that are no numbers are not looked at."""
        if self.window == 0 or not math.isfinite(loss):
            return None
        if stage != self._stage:
            self._stage = stage
            self._losses.clear()
        if len(self._losses) >= max(1, self.window // 2):
            mean = math.fsum(self._losses) / len(self._losses)
            variance = math.fsum((x - mean) ** 2 for x in self._losses) / len(self._losses)
            std = max(math.sqrt(variance), RELATIVE_FLOOR * abs(mean))
            if loss - mean > self.threshold * std:
                return Spike(loss, mean, std)
        self._losses.append(loss)
        return None
