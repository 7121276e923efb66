"""Random numbers as a pure function of integers: the same on every machine, for any library version or process count.

The data order, dropout seeds and sampling take all their random numbers from here, so no generator state is ever saved.
"""

from functools import lru_cache
from typing import Any

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _finalize(x: np.ndarray) -> np.ndarray:
    """Apply the output function of SplitMix64 (Steele, Lea, Flood 2014; Stafford's variant 13), a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix64(*words: int | np.ndarray) -> np.ndarray:
    """Return the uint64 hash of a tuple of integers; integer arrays among `words` broadcast.

    `mix64(seed, epoch, ids)` has one hash per id. The order and the number of words matter.
    """
    state: Any = np.uint64(len(words))
    rest = words
    while rest and isinstance(rest[0], (int, np.integer)):
        state, rest = _absorb_integer(state, int(rest[0])), rest[1:]
    for word in rest:
        state = _absorb(state, word)
    return state


def _absorb(state: Any, word: int | np.ndarray) -> np.ndarray:
    if isinstance(word, (int, np.integer)):
        word = int(word) & 0xFFFFFFFFFFFFFFFF
    with np.errstate(over="ignore"):
        return _finalize(state * _GOLDEN + np.asarray(word).astype(np.uint64) + _GOLDEN)


# Cached because tuples often begin with the same integers, and numpy takes longer for scalars than for a whole batch.
_absorb_integer = lru_cache(maxsize=1024)(_absorb)


def uniform(*words: int | np.ndarray) -> np.ndarray:
    """Return float64 in [0, 1) with 53 random bits, a pure function of `words` (see `mix64`)."""
    return (mix64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53
