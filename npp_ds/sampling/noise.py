"""Gumbel noise as a pure function of (seed, image index, position, vocabulary entry), on any device and without
generator state.
"""

import numpy as np
import torch
from torch import Tensor

from npp_ds.utils.hash_rng import mix64

_STREAM = int.from_bytes(b"sampling", "big")


def _int32(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


_GOLDEN = _int32(0x9E3779B9)
_FACTORS = (_int32(0x7FEB352D), _int32(0x846CA68B))


def noise_keys(seed: int, indices: Tensor, positions: int) -> Tensor:
    """int32 [B, positions, 2]: the 64-bit key of every draw of the images `indices`[B], as two words."""
    images = indices.cpu().numpy().astype(np.int64)[:, None]
    keys = mix64(_STREAM, seed, images, np.arange(positions)[None])
    words = keys.astype("<u8").view("<i4").reshape(*keys.shape, 2)
    return torch.from_numpy(words.astype(np.int32)).to(indices.device)


def _scramble(x: Tensor, scratch: Tensor) -> Tensor:
    """A bijection of 32-bit words, in place (the constants of `lowbias32`, C. Wellons,
    github.com/skeeto/hash-prospector); `scratch` is overwritten.

    The masks make torch's arithmetic right shifts logical ones.
    """
    for shift, mask, factor in ((16, 0xFFFF, _FACTORS[0]), (15, 0x1FFFF, _FACTORS[1]), (16, 0xFFFF, None)):
        x ^= torch.bitwise_right_shift(x, shift, out=scratch).bitwise_and_(mask)
        if factor is not None:
            x *= factor
    return x


def gumbel(keys: Tensor, vocab_size: int) -> Tensor:
    """keys int32 [B, 2] -> standard Gumbel noise, float32 [B, vocab_size], row by row independent of the other rows.

    With u uniform, -log(-log(1 - u)) is Gumbel as well and keeps full float32 resolution for the large values, which
    decide which code wins: u is a multiple of 2^-31 plus 2^-32.
    """
    entries = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) * _GOLDEN
    words = entries + keys[:, :1]
    scratch = torch.empty_like(words)
    words = _scramble(_scramble(words, scratch).bitwise_xor_(keys[:, 1:]), scratch)
    minus_u = scratch.view(torch.float32).copy_(words.bitwise_and_(0x7FFFFFFF)).add_(0.5).mul_(-(2.0**-31))
    return minus_u.clamp_(min=2.0**-24 - 1).log1p_().neg_().log_().neg_()
