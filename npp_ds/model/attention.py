"""The kernels of causal self-attention: which can run where, and calls of them."""

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from npp_ds.errors import UserError

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
