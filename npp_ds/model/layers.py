"""Layers with the published initialisation, and activation checkpointing around them.

Weights are drawn inside the constructors, because DeepSpeed's `zero.Init` partitions a module as soon as it is built.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

SAVED_BY_SELECTIVE = {
    "aten.mm.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "flash_attn._flash_attn_forward.default",
}
"""Operations whose results the mode `selective` saves: matrix products and attention, nearly all FLOPs of a block."""


def init_normal(weight: Tensor) -> None:
    """Fill `weight` from N(0, 0.02), generated in float32 on the CPU, then rounded to the dtype of `weight`.

    For one seed PyTorch generates other numbers on a GPU, and in bf16 other ones in each version, while DeepSpeed's
    `zero.Init` (0.19.8) allocates `weight` on the GPU and in the engine's precision. Beside `weight` itself this takes
    memory for one copy of it in float32 on the host.
    """
    if not weight.is_meta:  # there drawing would change nothing, and PyTorch would import its compiler for it
        weight.data = torch.empty_like(weight, dtype=torch.float32, device="cpu").normal_(std=0.02).to(weight)


class Linear(nn.Linear):
    """A projection without bias, drawn from N(0, 0.02)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        init_normal(self.weight)


class Embedding(nn.Embedding):
    """A table drawn from N(0, 0.02)."""

    def reset_parameters(self) -> None:
        init_normal(self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm, eps 1e-5, computed in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-5).type_as(x)


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation) in SAVED_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(mode: str, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return block(*inputs), with the activations saved for the backward pass that `mode` names; it recomputes others.

    "none" saves all of them, "selective" the results of `SAVED_BY_SELECTIVE`, "block" only the block's inputs. Dropout
    masks are recomputed too, so results and gradients do not depend on the mode.
    """
    if mode == "none":
        return block(*inputs)
    if mode == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    return checkpoint(block, *inputs, use_reentrant=False)
