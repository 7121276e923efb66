"""Causal self-attention with 2-D rotary positions on the patch grid, its kernels, and a key-value cache."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from npp_ds.errors import UserError
from npp_ds.model.layers import Linear

SDPA_BACKENDS: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
"""SDPA's backend by kernel name; None leaves the choice to PyTorch."""
KERNELS = ("flash_attn", *SDPA_BACKENDS)
ATTENTION_CHOICES = ("auto", *KERNELS)
"""Values of `model.attention`. "auto" is flash_attn where it can run, else sdpa."""

_CAN_USE = {
    "sdpa_flash": torch.backends.cuda.can_use_flash_attention,
    "sdpa_cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "sdpa_efficient": torch.backends.cuda.can_use_efficient_attention,
}


def flash_attn_is_installed() -> bool:
    """Return whether flash-attn 2 can be imported."""
    try:  # by this module: flash-attn-4 installs a package of the same name
        return find_spec("flash_attn.flash_attn_interface") is not None
    except ImportError:
        return False


def check_attention(choice: str) -> None:
    """Raise UserError if `choice` is unknown or names a kernel that is not installed."""
    if choice not in ATTENTION_CHOICES:
        raise UserError(f"attention: {choice!r} is not one of {', '.join(ATTENTION_CHOICES)}")
    if choice == "flash_attn" and not flash_attn_is_installed():
        raise UserError(
            "attention: flash_attn is chosen, but the package flash-attn is not installed; "
            "run `pip install flash-attn`, or set attention to auto or sdpa"
        )


@cache
def missing_requirement(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    positions: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    with_dropout: bool,
) -> str | None:
    """Return what `kernel` requires and a call with these properties lacks, or None if the kernel can run it."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if kernel == "flash_attn":
        fits = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
        if not (on_gpu and fits and torch.cuda.get_device_capability(device) >= (8, 0)):
            return "bf16 or fp16 on an Ampere GPU or later and a head dimension that is a multiple of 8 up to 256"
        return None if flash_attn_is_installed() else "the package flash-attn"
    if kernel in ("sdpa_cudnn", "sdpa_efficient") and not on_gpu:
        return "a CUDA device"
    if on_gpu and kernel in _CAN_USE:  # SDPA answers for tensors of one image that need gradients
        shapes = ((1, n, positions, head_dim) for n in (heads, kv_heads))
        q, k = (torch.empty(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
        call = torch.backends.cuda.SDPAParams(q, k, k, None, 0.1 if with_dropout else 0.0, True, heads != kv_heads)
        if not _CAN_USE[kernel](call):
            return "other tensors (torch.backends.cuda lists the conditions)"
    return None


def chosen_kernel(choice: str, device: torch.device, dtype: torch.dtype, *sizes: Any) -> str:
    """Return the name in `KERNELS` of the kernel that runs a call under `choice`.

    `sizes` are the other parameters of `missing_requirement`. Raises UserError if `choice` names a kernel that cannot.
    """
    if choice == "auto":
        return "sdpa" if missing_requirement("flash_attn", device, dtype, *sizes) else "flash_attn"
    if missing := missing_requirement(choice, device, dtype, *sizes):
        raise UserError(
            f"attention: {choice} needs {missing}, found {dtype} on {device.type}, head dimension {sizes[3]}; set "
            "precision to bf16 or autocast_bf16 on such a GPU, or attention to auto or sdpa"
        )
    return choice


def causal_attention(q: Tensor, k: Tensor, v: Tensor, choice: str = "auto", dropout: float = 0.0) -> Tensor:
    """Return attention [B, N, H, D] of q[B, N, H, D] to k and v[B, N, G, D], G divides H; position i sees 0..i.

    No mask tensor is passed, so fused kernels can run. Raises UserError if `choice` names a kernel that cannot.
    """
    _, positions, heads, head_dim = q.shape
    kernel = chosen_kernel(choice, q.device, q.dtype, positions, heads, k.shape[2], head_dim, dropout > 0)
    if kernel == "flash_attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, dropout_p=dropout, causal=True)
    backend = SDPA_BACKENDS[kernel]
    grouped = q.shape != k.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with nullcontext() if backend is None else sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def rotary_table(grid: int, head_dim: int, device: torch.device | str = "cpu", patch_side: int = 1) -> Tensor:
    """Return cos and sin of the RoPE angles as float32 [grid*grid, head_dim/2, 2]; row i is input position i.

    Row 0, the class position, is zero as in the published code, so q and k of that position are zero. Row i > 0 encodes
    patch i - 1: its grid row in the first half of the features, its grid column in the second (LlamaGen, base 10000).
    A grid row or column g counts as (g + 0.5) * patch_side - 0.5. With `patch_side` 1 this is g itself; with the side p
    of the patches it is the patch's center in units of codes.
    """
    quarter = head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32, device=device) * 2 / (head_dim // 2))
    centers = (torch.arange(grid, dtype=torch.float32, device=device) + 0.5) * patch_side - 0.5
    angles = centers[:, None] * frequencies
    rows = angles[:, None, :].expand(grid, grid, quarter)
    columns = angles[None, :, :].expand(grid, grid, quarter)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table[:-1]])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x[B, N, H, D], neighbouring features as pairs, by table[N, D/2, 2]; computed in float32, in x's dtype.

    Eager code multiplies complex numbers, in one pass over x; products and sums of strided halves take eight. Inductor
    fuses the latter into one pass but has no kernels for complex numbers (torch 2.15).
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), table[:, None].unbind(-1)
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None])
    return rotated.flatten(-2).type_as(x)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Return attention [B, H, 1, D] of q[B, H, 1, D] to the entries of k and v[B, G, L, D] where seen[L] is true.

    Sums are float32. These are products and sums instead of matrix products: with a single query, compiled code reads
    every key and value once at memory bandwidth, while tiles of a matrix kernel would be mostly padding. Entries that
    are not seen must be finite.
    """
    query = q.float().unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
    scores = (query * k.float()[:, :, None]).sum(-1)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights.unsqueeze(-1) * v.float()[:, :, None]).sum(-2).flatten(1, 2).unsqueeze(2).type_as(q)


@dataclass
class KeyValueCache:
    """Keys and values of earlier positions, [B, G, positions, D] per layer, and the `rotary_table` of all positions."""

    keys: list[Tensor]
    values: list[Tensor]
    rotary: Tensor


class Attention(nn.Module):
    """Self-attention, x[B, N, dim] -> [B, N, dim]; with `n_kv_heads` < `n_heads`, query heads share keys and values."""

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int, choice: str, attention_dropout: float, residual_dropout: float
    ):
        super().__init__()
        check_attention(choice)
        self.heads, self.kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.choice, self.attention_dropout = choice, attention_dropout
        self.wqkv = Linear(dim, (n_heads + 2 * n_kv_heads) * self.head_dim)
        self.wo = Linear(dim, dim)
        self.residual_dropout = nn.Dropout(residual_dropout)

    def rotated_qkv(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x[B, N, dim] to queries [B, N, H, D], keys and values [B, N, G, D]; queries and keys are rotated."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        return rotate(q, rotary), rotate(k, rotary), v

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        q, k, v = self.rotated_qkv(x, rotary)
        out = causal_attention(q, k, v, self.choice, self.attention_dropout if self.training else 0.0)
        return self.residual_dropout(self.wo(out.flatten(2)))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        """Return the output [B, 1, dim] of one position with query q[B, 1, H, D] over keys and values[B, G, L, D].

        The boolean seen[L] marks the entries to attend to; None means all.
        """
        q = q.transpose(1, 2)
        if seen is None:
            out = F.scaled_dot_product_attention(q, keys, values, enable_gqa=self.heads != self.kv_heads)
        else:
            out = masked_attention(q, keys, values, seen)
        return self.wo(out.transpose(1, 2).flatten(2))
