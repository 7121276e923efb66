"""Decoding: class labels in, VQ codes out, one patch after the other with a key-value cache."""

import torch
from torch import Tensor

from npp_ds.errors import UserError
from npp_ds.model.patches import repeat_code, ungroup
from npp_ds.model.transformer import Transformer
from npp_ds.sampling.guidance import check_guidance, guidance_scales, guide
from npp_ds.sampling.noise import gumbel, noise_keys


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
    logits = keep_likely(logits / temperature, top_k, top_p)
    return (logits + gumbel(keys, logits.shape[1])).argmax(-1)


def _check(model: Transformer, labels: Tensor, guidance: tuple, temperature, top_k, top_p, patch_side) -> None:
    c = model.config
    problems = check_guidance(*guidance)
    if not temperature >= 0:
        problems.append(f"temperature: found {temperature}, expected a number >= 0 (0 takes the most likely code)")
    if top_k < 0:
        problems.append(f"top_k: found {top_k}, expected a whole number >= 0 (0 keeps all codes)")
    if not 0 < top_p <= 1:
        problems.append(f"top_p: found {top_p}, expected a number in (0, 1] (1 keeps all codes)")
    if patch_side < 1 or c.grid_size % patch_side:
        problems.append(f"patch_side: found {patch_side}, expected a divisor of the grid size {c.grid_size}")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) <= c.num_classes):
        problems.append(
            f"labels: found {int(labels.min())}..{int(labels.max())}, "
            f"expected classes 0..{c.num_classes - 1} ({c.num_classes} is the null class)"
        )
    if problems:
        raise UserError("sampling options: " + "; ".join(problems))


@torch.no_grad()
def generate(
    model: Transformer,
    labels: Tensor,
    indices: Tensor,
    *,
    seed: int,
    cfg_scale: float = 1.0,
    cfg_schedule: str = "constant",
    cfg_power: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    patch_side: int = 1,
) -> Tensor:
    """labels[B] and image numbers indices[B], int64 -> codes int64 [B, grid_size**2] in raster order.

    Image i depends only on (seed, i) and its label, never on the other images of the batch, the batch size or the
    number of processes: draws are Gumbel-max with noise that is a function of (seed, i, position, code). Logits
    computed in another batch size differ in their last bits; Gumbel-max turns that into another code only when two of V
    noisy logits lie that close together, while with the inverse of the cumulative distribution every rounding error of
    the sum moves all borders.

    Guidance is that of `guidance_scales`; as long as a position ahead needs it, the conditional and the unconditional
    half run as one batch of 2B. `patch_side` > 1
    samples a model of an early stage on its coarse grid and shows every patch as one code repeated. Raises UserError
    for options out of range, all named at once.
    """
    guidance = (cfg_scale, cfg_schedule, cfg_power, cfg_interval)
    _check(model, labels, guidance, temperature, top_k, top_p, patch_side)
    grid = model.config.grid_size // patch_side
    scales = guidance_scales(grid * grid, *guidance)
    guided = any(scale != 1 for scale in scales)
    if not len(labels):
        return labels.new_zeros((0, model.config.grid_size**2), dtype=torch.int64)
    inputs = torch.cat([labels, torch.full_like(labels, model.config.num_classes)]) if guided else labels
    cache = model.new_cache(len(inputs), grid * grid, next(model.parameters()).dtype, labels.device)
    keys = noise_keys(seed, indices, grid * grid).to(labels.device)
    chosen = []
    for position in range(grid * grid):
        logits = model.decode_step(inputs, position, grid, cache)
        if guided:
            logits = guide(logits, torch.tensor(scales[position], device=logits.device))
        codes = choose(logits, keys[:, position], temperature, top_k, top_p)
        chosen.append(codes)
        inputs = repeat_code(codes.repeat(2 if guided else 1), patch_side**2)
    return ungroup(repeat_code(torch.stack(chosen, dim=1), patch_side**2), patch_side)
