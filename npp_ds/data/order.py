"""The samples of a batch, the crop of each and the labels that are dropped: pure functions of seed, epoch and sample.

They depend on `hash_rng.mix64` and a stable argsort, not on a library's generator, so the order never changes.
"""

from functools import lru_cache

import numpy as np

from npp_ds.errors import UserError
from npp_ds.utils.hash_rng import mix64, uniform

_PERMUTATION, _CROP, _LABEL = 1, 2, 3


@lru_cache(maxsize=2)
def epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the samples in `epoch`, int64 [num_samples], read-only: a permutation of their indices."""
    keys = mix64(_PERMUTATION, seed, epoch, np.arange(num_samples))
    permutation = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    permutation.flags.writeable = False
    return permutation


def batch_ids(num_samples: int, batch_size: int, seed: int, epoch: int, index: int) -> np.ndarray:
    """Return the samples of global batch `index` of `epoch` in order, int64 [batch_size], read-only.

    An epoch has `num_samples // batch_size` batches; the samples that are left over differ from epoch to epoch.
    Raises IndexError for a batch that the epoch does not have.
    """
    if not 0 <= index < num_samples // batch_size:
        raise IndexError(f"batch {index} of {num_samples // batch_size} ({num_samples} samples, {batch_size} a batch)")
    return epoch_permutation(num_samples, seed, epoch)[index * batch_size : (index + 1) * batch_size]


def crop_index(ids: np.ndarray, seed: int, epoch: int, num_crops: int) -> np.ndarray:
    """Return the crop of each sample in `epoch`, int64 of the shape of `ids`: uniform below `num_crops`."""
    return (uniform(_CROP, seed, epoch, ids) * num_crops).astype(np.int64)


def drop_label(ids: np.ndarray, seed: int, epoch: int, rate: float) -> np.ndarray:
    """Return whether the null class replaces the label of each sample in `epoch`, with probability `rate`.

    The result is bool of the shape of `ids`.
    """
    return uniform(_LABEL, seed, epoch, ids) < rate


def rank_slice(batch_size: int, world_size: int, rank: int, micro_batch_size: int) -> np.ndarray:
    """Return the rows of a global batch that `rank` trains on, int64 [gradient_accumulation_steps, micro_batch_size].

    In micro-step m the ranks together take world_size * micro_batch_size consecutive rows, the m-th such block, so the
    batch and its order do not depend on the number of processes. Raises UserError if the sizes do not divide evenly.
    """
    rows = world_size * micro_batch_size
    if batch_size < 1 or rows < 1 or batch_size % rows:
        raise UserError(
            f"batch_size {batch_size} is not a multiple of micro_batch_size {micro_batch_size} x {world_size} "
            "processes; choose a micro_batch_size or a number of processes that divides it."
        )
    if not 0 <= rank < world_size:
        raise IndexError(f"rank {rank} of {world_size}")
    return np.arange(batch_size).reshape(-1, world_size, micro_batch_size)[:, rank]
