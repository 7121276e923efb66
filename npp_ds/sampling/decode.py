"""Decoding: class labels in, VQ codes out, one patch after the other with a key-value cache."""

from dataclasses import asdict

import torch
from torch import Tensor

from npp_ds.errors import UserError
from npp_ds.model.patches import repeat_code, ungroup
from npp_ds.model.transformer import Transformer
from npp_ds.sampling.guidance import check_guidance, guidance_scales
from npp_ds.sampling.logits_processing import Drawing
from npp_ds.sampling.noise import noise_keys
from npp_ds.sampling.steps import Batch, recorded_steps
from npp_ds.sizes import num_positions


def option_problems(
    grid_size: int,
    *,
    cfg_scale: float = 1.0,
    cfg_schedule: str = "constant",
    cfg_power: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    patch_side: int = 1,
) -> list[str]:
    """What is wrong with these options of `generate` for a model of this grid, one sentence each."""
    problems = check_guidance(cfg_scale, cfg_schedule, cfg_power, cfg_interval)
    if not temperature >= 0:
        problems.append(f"temperature: found {temperature}, expected a number >= 0 (0 takes the most likely code)")
    if top_k < 0:
        problems.append(f"top_k: found {top_k}, expected a whole number >= 0 (0 keeps all codes)")
    if not 0 < top_p <= 1:
        problems.append(f"top_p: found {top_p}, expected a number in (0, 1] (1 keeps all codes)")
    if patch_side < 1 or grid_size % patch_side:
        problems.append(f"patch_side: found {patch_side}, expected a divisor of the grid size {grid_size}")
    return problems


def _label_problems(labels: Tensor, num_classes: int) -> list[str]:
    if not labels.numel() or (int(labels.min()) >= 0 and int(labels.max()) <= num_classes):
        return []
    found = f"{int(labels.min())}..{int(labels.max())}"
    return [f"labels: found {found}, expected classes 0..{num_classes - 1} ({num_classes} is the null class)"]


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
    capture: bool = False,
) -> Tensor:
    """labels[B] and image numbers indices[B], int64 -> codes int64 [B, grid_size**2] in raster order.

    Image i depends only on (seed, i), its label and the options, never on the other images of the batch, the batch size
    or the number of processes: draws are Gumbel-max with noise that is a function of (seed, i, position, code). Logits
    computed in another batch size differ in their last bits; Gumbel-max turns that into another code only when two of V
    noisy logits lie that close together, while with the inverse of the cumulative distribution every rounding error of
    the sum moves all borders.

    Guidance is that of `guidance_scales`; as long as a position ahead needs it, the conditional and the unconditional
    half run as one batch of 2B. `patch_side` > 1 samples a model of an early stage on its coarse grid and shows every
    patch as one code repeated.

    With `capture`, steps take the form that on CUDA is compiled, recorded as graphs and replayed (`steps.py`), for
    batches of exactly this size: worth it from the second one on (`worth_recording`). Its logits differ from the plain
    ones in their last bits. Raises UserError for options out of range, all named at once.
    """
    guidance = {
        "cfg_scale": cfg_scale, "cfg_schedule": cfg_schedule, "cfg_power": cfg_power, "cfg_interval": cfg_interval
    }  # fmt: skip
    drawing = Drawing(temperature, top_k, top_p, patch_side)
    problems = option_problems(model.config.grid_size, **guidance, **asdict(drawing))
    if problems := problems + _label_problems(labels, model.config.num_classes):
        raise UserError("sampling options: " + "; ".join(problems))
    positions = num_positions(model.config.grid_size, patch_side)
    if not len(labels):
        return labels.new_zeros((0, model.config.grid_size**2), dtype=torch.int64)
    scales = guidance_scales(positions, **guidance)
    guided = max((i + 1 for i, scale in enumerate(scales) if scale != 1), default=0)
    if capture:
        recorded = recorded_steps(model, len(labels), guided > 0, drawing, labels.device)
        batch, step = recorded.batch, recorded.step
    else:
        batch = Batch(model, len(labels), guided > 0, drawing, labels.device)
        step = batch.step
    batch.fill(labels, noise_keys(seed, indices, positions), scales)
    for position in range(positions):
        step(model, position, position < guided)
    codes = batch.codes.t().clone()
    return ungroup(repeat_code(codes, patch_side**2), patch_side)
