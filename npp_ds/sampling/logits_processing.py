"""From logits to codes: classifier-free guidance, temperature, top-k, top-p, and Gumbel-max sampling.

The Gumbel noise is a pure function of (seed, image index, position, vocabulary entry) on any device.
"""

from dataclasses import dataclass
from math import cos, inf, pi

import numpy as np
import torch
from torch import Tensor

from npp_ds.utils.hash_rng import mix64

CFG_SCHEDULES = {"constant": lambda t: 1.0, "linear": lambda t: t, "cosine": lambda t: (1 - cos(pi * t)) / 2}
_STREAM = int.from_bytes(b"sampling", "big")


@dataclass(frozen=True)
class Options:
    """How codes are sampled. `seed` seeds the noise; `cfg_scale` to `cfg_interval` are those of `guidance_scales`.

    `temperature` 0 takes the most likely code. `top_k` 0 and `top_p` 1 keep all codes. A `patch_side` above 1 samples a
    model of an early stage on its coarse grid and repeats each code over its patch. Names of sample folders list the
    options in the order of these fields.
    """

    seed: int = 0
    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    patch_side: int = 1
    cfg_schedule: str = "constant"
    cfg_power: float = 1.0
    cfg_interval: int = -1

    def problems(self, grid_size: int) -> list[str]:
        """Return what is wrong with these options for a model of this grid size, one sentence each."""
        divisors = [side for side in range(1, grid_size + 1) if grid_size % side == 0]
        is_power = 0 < self.cfg_power < inf
        bends = self.cfg_schedule != "constant" or self.cfg_power == 1
        checks = (
            ("cfg_scale", 0 <= self.cfg_scale < inf, "a number >= 0 (1 is no guidance)"),
            ("cfg_schedule", self.cfg_schedule in CFG_SCHEDULES, f"one of {', '.join(CFG_SCHEDULES)}"),
            ("cfg_power", is_power, "a number > 0 (1 is the plain schedule)"),
            ("cfg_power", bends or not is_power, "1, because it has no effect on cfg_schedule constant"),
            ("cfg_interval", self.cfg_interval >= -1, "a whole number >= -1 (-1 guides to the end)"),
            ("temperature", self.temperature >= 0, "a number >= 0 (0 takes the most likely code)"),
            ("top_k", self.top_k >= 0, "a whole number >= 0 (0 keeps all codes)"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1] (1 keeps all codes)"),
            ("patch_side", self.patch_side in divisors, f"a divisor of the grid size {grid_size}"),
        )
        return [f"{name}: found {getattr(self, name)!r}, expected {wanted}" for name, ok, wanted in checks if not ok]

    def guidance_scales(self, positions: int) -> list[float]:
        """Return the guidance scale at each position 0 .. `positions` - 1; 1 is no guidance.

        The scale is 1 + (cfg_scale - 1) * f(t) with t = (position / positions) ** cfg_power. f(t) is 1 for "constant",
        t for "linear" (Muse uses it over its steps, arXiv 2301.00704), and (1 - cos(pi t)) / 2 for "cosine", the
        power-cosine schedule of MDT (arXiv 2303.14389) and RAR (arXiv 2411.00776), where `cfg_power` is called
        `guidance_scale_pow`.

        With `cfg_interval` >= 0 guidance ends after position cfg_interval + 1, as in LlamaGen's sampler, which counts
        from the second code.
        """
        shape = CFG_SCHEDULES[self.cfg_schedule]
        last = positions if self.cfg_interval == -1 else self.cfg_interval + 1
        strengths = [shape((i / positions) ** self.cfg_power) if i <= last else 0.0 for i in range(positions)]
        return [self.cfg_scale if strength == 1 else 1 + (self.cfg_scale - 1) * strength for strength in strengths]


def guide(logits: Tensor, scale: Tensor) -> Tensor:
    """Return uncond + (cond - uncond) * scale (LlamaGen, arXiv 2406.06525), or exactly cond where the scale is 1.

    logits [2B, V], the conditional half first, and a scalar tensor -> [B, V].
    """
    conditional, unconditional = logits.chunk(2)
    return torch.where(scale == 1, conditional, unconditional + (conditional - unconditional) * scale)


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return logits [B, V] with -inf outside the `top_k` largest (0: all) and outside the nucleus `top_p` (1: all).

    The nucleus, never empty, holds each entry before which the sorted probabilities after top-k sum to at most `top_p`.
    """
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        beyond = (p.cumsum(-1) - p) > top_p
        logits = logits.masked_fill(torch.empty_like(beyond).scatter_(1, order, beyond), -torch.inf)
    return logits


def choose(logits: Tensor, keys: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Sample codes from softmax(logits / temperature), or take the largest logit if the temperature is 0.

    logits [B, V] and keys int32 [B, 2] -> codes int64 [B].
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = keep_likely(logits if temperature == 1 else logits / temperature, top_k, top_p)
    return gumbel(keys, logits.shape[1]).add_(logits).argmax(-1)


def guide_and_choose(
    logits: Tensor, scale: Tensor | None, keys: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Apply `guide` to logits [2B, V], or nothing to logits [B, V] if `scale` is None; then `choose` codes [B]."""
    return choose(logits if scale is None else guide(logits, scale), keys, temperature, top_k, top_p)


_GOLDEN = 0x9E3779B9 - (1 << 32)  # as int32
_FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))


def noise_keys(seed: int, indices: Tensor, positions: int) -> Tensor:
    """Return int32 [B, positions, 2]: the 64-bit key of each draw of the images `indices` [B], as two words."""
    images = indices.cpu().numpy().astype(np.int64)[:, None]
    keys = mix64(_STREAM, seed, images, np.arange(positions)[None])
    words = keys.astype("<u8").view("<i4").reshape(*keys.shape, 2)
    return torch.from_numpy(words.astype(np.int32)).to(indices.device)


def gumbel(keys: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise, float32 [B, vocab_size], of keys int32 [B, 2]; each row depends on its key only.

    For uniform u, -log(-log(1 - u)) is Gumbel too, and it keeps full float32 resolution for the large values, which
    decide the code. u is a multiple of 2^-31 plus 2^-32.
    """
    entries = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) * _GOLDEN
    words = entries + keys[:, :1]
    scratch = torch.empty_like(words)
    words = _scramble(_scramble(words, scratch).bitwise_xor_(keys[:, 1:]), scratch)
    minus_u = scratch.view(torch.float32).copy_(words.bitwise_and_(0x7FFFFFFF)).add_(0.5).mul_(-(2.0**-31))
    return minus_u.clamp_(min=2.0**-24 - 1).log1p_().neg_().log_().neg_()


def _scramble(x: Tensor, scratch: Tensor) -> Tensor:
    """Apply a bijection of 32-bit words in place; `scratch` is overwritten.

    The constants are those of `lowbias32` (C. Wellons, github.com/skeeto/hash-prospector). The masks turn torch's
    arithmetic right shifts into logical ones.
    """
    for shift, mask, factor in ((16, 0xFFFF, _FACTORS[0]), (15, 0x1FFFF, _FACTORS[1]), (16, 0xFFFF, None)):
        x ^= torch.bitwise_right_shift(x, shift, out=scratch).bitwise_and_(mask)
        if factor is not None:
            x *= factor
    return x
