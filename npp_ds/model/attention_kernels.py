"""Which kernel computes causal attention: the one asked for, or with "auto" the one that was measured to be fastest.

The answer depends on the choice and on the device, type and shape, which all processes of a run share, and never on a
clock: it is the same on every rank and at every start.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from npp_ds.errors import UserError

MEASURED = Path(__file__).with_name("attention_measured.json")
"""What `python -m benchmarks.attention --gpu --write-choice` found: by compute capability ("9.0") and number of
positions the kernels from fastest to slowest."""
UNMEASURED = ("flash_attn", "sdpa")
"""What "auto" tries on a GPU of which nothing is known."""


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, dropout_p=dropout, causal=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float, backend: SDPBackend | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, is_causal=True)
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return attend(q, k, v, enable_gqa=grouped).transpose(1, 2)
    with sdpa_kernel(backend):
        return attend(q, k, v, enable_gqa=grouped).transpose(1, 2)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "flash_attn": _flash_attn,
    "sdpa": _sdpa,
    "sdpa_flash": partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": partial(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": partial(_sdpa, backend=SDPBackend.MATH),
    "flash_attn_4": partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
}
"""Kernel(q[B, N, H, D], k and v[B, N, G, D], dropout) -> [B, N, H, D]. flash_attn_4 takes the place of PyTorch's own
flash kernel in the whole process once it is used."""
ATTENTION_CHOICES = ("auto", *KERNELS)

_PACKAGES = {
    "flash_attn": ("flash_attn.flash_attn_interface", "flash-attn"),
    "flash_attn_4": ("flash_attn.cute.interface", "flash-attn-4"),
}
_APPLIES = {
    "sdpa_flash": torch.backends.cuda.can_use_flash_attention,
    "sdpa_cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "sdpa_efficient": torch.backends.cuda.can_use_efficient_attention,
}
_CAN_EXCHANGE = hasattr(torch.nn.attention, "activate_flash_attention_impl")
_GPU_ONLY = ("flash_attn", "sdpa_cudnn", "sdpa_efficient", "flash_attn_4")


class Call(NamedTuple):
    """What decides between kernels."""

    device: torch.device
    dtype: torch.dtype
    positions: int
    heads: int
    kv_heads: int
    width: int
    with_dropout: bool


def importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of the package that it would be in
        return False


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU; None for other devices, and for a GPU's stand-in where there is none."""
    is_there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if is_there else None


def check_attention(choice: str) -> None:
    """Raises UserError when `choice` is unknown or names a kernel that is not installed."""
    if choice not in ATTENTION_CHOICES:
        raise UserError(f"attention: {choice!r} is not one of {', '.join(ATTENTION_CHOICES)}")
    module, package = _PACKAGES.get(choice, (None, None))
    if module and not importable(module):
        raise UserError(
            f"attention: {choice} was asked for and the package {package} is not installed; "
            f"run `pip install {package}`, or set attention to auto or sdpa"
        )
    if choice == "flash_attn_4" and not _CAN_EXCHANGE:
        raise UserError(
            f"attention: flash_attn_4 needs a newer PyTorch than {torch.__version__}, which cannot exchange its flash "
            "kernel; update torch, or set attention to auto or sdpa"
        )


def _is_installed(kernel: str) -> bool:
    try:
        check_attention(kernel)
    except UserError:
        return False
    return True


def _needs(kernel: str, call: Call) -> str | None:
    """What `kernel` needs and does not find; None when it applies."""
    found, half = capability(call.device), call.dtype in (torch.float16, torch.bfloat16)
    if kernel == "flash_attn" and not (found and found >= (8, 0) and half and call.width % 8 == 0 < call.width <= 256):
        return "bf16 or fp16 on an Ampere GPU or later and a head width that is a multiple of 8 up to 256"
    if kernel == "flash_attn_4" and not (found and found[0] in (9, 10) and half and not call.with_dropout):
        return "bf16 or fp16 on a GPU of compute capability 9.0 or 10.0, without attention dropout"
    if kernel in _GPU_ONLY and not found:
        return "a CUDA device"
    if found and kernel in _APPLIES and not _torch_applies(kernel, call):
        return "what PyTorch does not find in these tensors (see torch.backends.cuda)"
    return None


def _torch_applies(kernel: str, call: Call) -> bool:
    """Whether PyTorch lets SDPA take this kernel, asked with tensors of one image that need gradients."""
    options = {"dtype": call.dtype, "device": call.device, "requires_grad": True}
    q = torch.empty(1, call.heads, call.positions, call.width, **options)
    k = torch.empty(1, call.kv_heads, call.positions, call.width, **options)
    dropout, grouped = 0.1 if call.with_dropout else 0.0, call.heads != call.kv_heads
    return _APPLIES[kernel](torch.backends.cuda.SDPAParams(q, k, k, None, dropout, True, grouped))


@cache
def measured_orders() -> Mapping[str, Mapping[int, list[str]]]:
    """By compute capability and number of positions: kernels from fastest to slowest. Raises UserError."""
    try:
        found = json.loads(MEASURED.read_text())
        orders = {
            capability: {int(positions): order for positions, order in device["order"].items()}
            for capability, device in found["devices"].items()
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{MEASURED}: cannot be read ({error!r}); write it anew with `python -m benchmarks.attention --gpu "
            "--write-choice`, or set model.attention to sdpa"
        ) from error
    unknown = {k for by_positions in orders.values() for order in by_positions.values() for k in order} - set(KERNELS)
    if unknown:
        raise UserError(f"{MEASURED}: names {', '.join(sorted(unknown))}, which are none of {', '.join(KERNELS)}")
    return orders


def _order(call: Call) -> tuple[str, ...]:
    """What "auto" tries in turn: by the measurement of the number of positions that is nearest in ratio."""
    found = capability(call.device)
    by_positions = measured_orders().get("{}.{}".format(*found)) if found else None
    if not by_positions:
        return UNMEASURED
    nearest = min(sorted(by_positions), key=lambda positions: abs(log(positions / call.positions)))
    return (*by_positions[nearest], *UNMEASURED)


@cache
def _chosen(choice: str, call: Call) -> str:
    kernel = choice
    if choice == "auto":
        kernel = next(k for k in _order(call) if _is_installed(k) and not _needs(k, call))
    elif needs := _needs(kernel, call):
        raise UserError(
            f"attention: {kernel} needs {needs}, found {call.dtype} on {call.device.type}, head width "
            f"{call.width}; set precision to bf16 or autocast_bf16 on such a GPU, or attention to auto or sdpa"
        )
    if kernel == "flash_attn_4":
        use_flash_implementation("FA4")
    return kernel


def use_flash_implementation(name: str | None) -> None:
    """What stands behind SDPA's flash kernel in this process from now on: "FA4", or None for PyTorch's own."""
    if _CAN_EXCHANGE and name != torch.nn.attention.current_flash_attention_impl():
        if name:
            torch.nn.attention.activate_flash_attention_impl(name)
        else:
            torch.nn.attention.restore_flash_attention_impl()


def chosen_kernel(choice: str, *call: Any) -> str:
    """The name in `KERNELS` that `choice` means for a `Call` with these fields, always the same in one process.

    Raises UserError when the kernel that was asked for does not apply.
    """
    return _chosen(choice, Call(*call))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, choice: str = "auto", dropout: float = 0.0) -> Tensor:
    """q[B, N, H, D], k and v[B, N, G, D], G divides H -> [B, N, H, D]; position i sees positions 0..i.

    No mask tensor is passed, so fused kernels apply. Raises UserError when a kernel is asked for that cannot be used.
    """
    _, positions, heads, width = q.shape
    kernel = chosen_kernel(choice, q.device, q.dtype, positions, heads, k.shape[2], width, dropout > 0)
    return KERNELS[kernel](q, k, v, dropout)
