"""Square patches of a code map (NPP, arXiv 2412.15321, section 3): grouping and its inverse."""

from math import isqrt

import torch
from torch import Tensor


def _grid_of(count: int, what: str) -> int:
    grid = isqrt(count)
    if grid * grid != count or count == 0:
        raise ValueError(f"{count} {what} do not form a square grid")
    return grid


def group(codes: Tensor, patch_side: int) -> Tensor:
    """Group codes[B, T] into [B, N, k]: N = T / k patches of k = patch_side**2 codes, both in raster order.

    Raises ValueError unless T is a square whose side is divisible by `patch_side`.
    """
    batch, tokens = codes.shape
    grid = _grid_of(tokens, "codes")
    if patch_side < 1 or grid % patch_side:
        raise ValueError(f"a {grid}x{grid} grid cannot be cut into patches of side {patch_side}")
    coarse = grid // patch_side
    x = codes.view(batch, coarse, patch_side, coarse, patch_side)
    return x.transpose(2, 3).reshape(batch, coarse * coarse, patch_side * patch_side)


def ungroup(codes: Tensor, patch_side: int) -> Tensor:
    """Return codes[B, N, k] as [B, T] in raster order, the inverse of `group`.

    Raises ValueError unless k = patch_side**2 and N is a square.
    """
    batch, patches, patch_area = codes.shape
    coarse = _grid_of(patches, "patches")
    if patch_area != patch_side * patch_side:
        raise ValueError(f"patches of side {patch_side} hold {patch_side * patch_side} codes, not {patch_area}")
    x = codes.reshape(batch, coarse, coarse, patch_side, patch_side)
    return x.transpose(2, 3).reshape(batch, patches * patch_area)


def repeat_code(codes: Tensor, patch_area: int) -> Tensor:
    """Return patches that repeat one code, codes[B, N] -> [B, N, k], as used to sample from a coarse model."""
    return torch.repeat_interleave(codes.unsqueeze(-1), patch_area, dim=-1)
