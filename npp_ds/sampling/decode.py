"""Decoding: class labels in, VQ codes out, one patch after the other with a key-value cache."""

import torch
from torch import Tensor

from npp_ds.errors import UserError
from npp_ds.model.patches import repeat_code, ungroup
from npp_ds.model.transformer import Transformer
from npp_ds.sampling.logits_processing import Options, noise_keys
from npp_ds.sampling.steps import DecodingBatch, captured_batch
from npp_ds.sizes import num_positions


def _label_problems(labels: Tensor, num_classes: int) -> list[str]:
    if not labels.numel() or (int(labels.min()) >= 0 and int(labels.max()) <= num_classes):
        return []
    found = f"{int(labels.min())}..{int(labels.max())}"
    return [f"labels: found {found}, expected classes 0..{num_classes - 1} ({num_classes} is the null class)"]


@torch.no_grad()
def generate(model: Transformer, labels: Tensor, indices: Tensor, options: Options, *, capture: bool = False) -> Tensor:
    """Sample the codes, int64 [B, grid_size**2] in raster order, of images with labels [B] and image numbers [B].

    Image i depends only on (seed, i), its label and the options, never on the other images of the batch, the batch size
    or the number of processes: codes are sampled by Gumbel-max, with noise that is a function of (seed, i, position,
    code). Logits differ in their last bits between batch sizes. With Gumbel-max this changes a code only if two of the
    V noisy logits are that close; with the inverse of the cumulative distribution, each rounding error of the sum would
    shift all intervals.

    While a later position needs guidance, the conditional and the unconditional half run as one batch of 2B.

    With `capture`, steps run in the form that on CUDA is compiled, captured as CUDA graphs and replayed (`steps.py`),
    for batches of exactly this size. That is faster from the second batch on (`worth_capturing`). Its logits differ
    from the plain ones in their last bits. Raises UserError that names all options out of range.
    """
    grid_size, side = model.config.grid_size, options.patch_side
    if problems := options.problems(grid_size) + _label_problems(labels, model.config.num_classes):
        raise UserError("sampling options: " + "; ".join(problems))
    positions = num_positions(grid_size, side)
    if not len(labels):
        return labels.new_zeros((0, grid_size**2), dtype=torch.int64)
    scales = options.guidance_scales(positions)
    guided = max((i + 1 for i, scale in enumerate(scales) if scale != 1), default=0)
    batch = (captured_batch if capture else DecodingBatch)(model, len(labels), guided > 0, options, labels.device)
    batch.fill(labels, noise_keys(options.seed, indices, positions), scales)
    for position in range(positions):
        batch.step(model, position, position < guided)
    codes = batch.codes.t().clone()
    return ungroup(repeat_code(codes, side**2), side)
