"""From logits to codes: guidance, temperature, top-k, top-p, and a draw that depends on its key only."""

from dataclasses import dataclass

import torch
from torch import Tensor

from npp_ds.sampling.guidance import guide
from npp_ds.sampling.noise import gumbel


@dataclass(frozen=True)
class Drawing:
    """What turns logits into codes, the same at all positions."""

    temperature: float
    top_k: int
    top_p: float
    patch_side: int


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """logits[B, V] with -inf outside the `top_k` largest (0: all) and outside the nucleus of mass `top_p` (1: all).

    The nucleus holds the entries before which the sorted probabilities, after top-k, sum to at most `top_p`; it is
    never empty.
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
    """logits[B, V], keys int32 [B, 2] -> codes int64 [B], drawn from softmax(logits / temperature) or, at 0, the
    largest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = keep_likely(logits if temperature == 1 else logits / temperature, top_k, top_p)
    return gumbel(keys, logits.shape[1]).add_(logits).argmax(-1)


def draw(logits: Tensor, scale: Tensor | None, keys: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """logits[2B, V] guided by `scale`, or logits[B, V] where it is None, keys int32 [B, 2] -> codes int64 [B]."""
    return choose(logits if scale is None else guide(logits, scale), keys, temperature, top_k, top_p)
