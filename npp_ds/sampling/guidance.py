"""Classifier-free guidance: how strong it is at each position, and what it does to the logits."""

from math import cos, pi

import torch
from torch import Tensor

CFG_SCHEDULES = ("constant", "linear", "cosine")


def check_guidance(cfg_scale: float, cfg_schedule: str, cfg_power: float, cfg_interval: int) -> list[str]:
    """What is wrong with these options of `guidance_scales`, one sentence each."""
    problems = []
    if not 0 <= cfg_scale < float("inf"):
        problems.append(f"cfg_scale: found {cfg_scale}, expected a number >= 0 (1 is no guidance)")
    if cfg_schedule not in CFG_SCHEDULES:
        problems.append(f"cfg_schedule: found {cfg_schedule!r}, expected one of {', '.join(CFG_SCHEDULES)}")
    if not 0 < cfg_power < float("inf"):
        problems.append(f"cfg_power: found {cfg_power}, expected a number > 0 (1 is the plain schedule)")
    elif cfg_power != 1 and cfg_schedule == "constant":
        problems.append(f"cfg_power: found {cfg_power}, expected 1 with cfg_schedule constant, which it cannot bend")
    if cfg_interval < -1:
        problems.append(f"cfg_interval: found {cfg_interval}, expected a whole number >= -1 (-1 guides to the end)")
    return problems


def guidance_scales(
    positions: int, cfg_scale: float, cfg_schedule: str = "constant", cfg_power: float = 1.0, cfg_interval: int = -1
) -> list[float]:
    """The guidance scale at each position 0 .. `positions` - 1; 1 is no guidance.

    It is 1 + (cfg_scale - 1) * f(t) with t = (position / positions) ** cfg_power and f(t) = 1 ("constant"), t
    ("linear", as Muse does over its steps, arXiv 2301.00704) or (1 - cos(pi t)) / 2 ("cosine", the power-cosine
    schedule of MDT, arXiv 2303.14389, and RAR, arXiv 2411.00776, whose `guidance_scale_pow` is `cfg_power`).

    With `cfg_interval` >= 0 guidance ends after position cfg_interval + 1, as in LlamaGen's sampler, which counts
    from the second code.
    """
    shapes = {"constant": lambda t: 1.0, "linear": lambda t: t, "cosine": lambda t: (1 - cos(pi * t)) / 2}
    shape = shapes[cfg_schedule]
    last = positions if cfg_interval == -1 else cfg_interval + 1
    strengths = [shape((i / positions) ** cfg_power) if i <= last else 0.0 for i in range(positions)]
    return [cfg_scale if strength == 1 else 1 + (cfg_scale - 1) * strength for strength in strengths]


def guide(logits: Tensor, scale: Tensor) -> Tensor:
    """logits[2B, V], the conditional half first, scale a scalar tensor -> [B, V]: uncond + (cond - uncond) * scale
    (LlamaGen, arXiv 2406.06525), and exactly the conditional half where the scale is 1.
    """
    conditional, unconditional = logits.chunk(2)
    return torch.where(scale == 1, conditional, unconditional + (conditional - unconditional) * scale)
