"""Gumbel noise as a pure function of (seed, image index, position, vocabulary entry), on any device and without
generator state.
"""

import numpy as np
import torch
from torch import Tensor

from npp_ds.mixing import mix64

_STREAM = int.from_bytes(b"sampling", "big")


def _int32(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


_GOLDEN = 0x9E3779B9
_FACTORS = (_int32(0x7FEB352D), _int32(0x846CA68B))


def noise_keys(seed: int, indices: Tensor, positions: int) -> Tensor:
    """int32 [B, positions, 2]: the 64-bit key of every draw of the images `indices`[B], as two words."""
    images = indices.cpu().numpy().astype(np.int64)[:, None]
    keys = mix64(_STREAM, seed, images, np.arange(positions)[None])
    words = keys.astype("<u8").view("<i4").reshape(*keys.shape, 2)
    return torch.from_numpy(words.astype(np.int32)).to(indices.device)


def _scramble(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, in place (the constants of `lowbias32`, C. Wellons,
    github.com/skeeto/hash-prospector).

    The masks make torch's arithmetic right shifts logical ones.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= _FACTORS[0]
    x ^= (x >> 15) & 0x1FFFF
    x *= _FACTORS[1]
    x ^= (x >> 16) & 0xFFFF
    return x


def gumbel(keys: Tensor, vocab_size: int) -> Tensor:
    """keys int32 [B, 2] -> standard Gumbel noise, float32 [B, vocab_size], row by row independent of the other rows.

    With u uniform, -log(-log(1 - u)) is Gumbel as well and keeps full float32 resolution for the large values, which
    decide which code wins: u is a multiple of 2^-31 plus 2^-32.
    """
    entries = torch.arange(vocab_size, dtype=torch.int64, device=keys.device) * _GOLDEN
    words = _scramble(entries.to(torch.int32) + keys[:, :1])
    words = _scramble(words.bitwise_xor_(keys[:, 1:]))
    u = (words & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
