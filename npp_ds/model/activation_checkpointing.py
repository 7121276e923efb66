"""Activation checkpointing: a block keeps less for the backward pass, which computes the rest again, bit for bit."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT_BY_SELECTIVE = {
    "aten.mm.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "flash_attn._flash_attn_forward.default",
}
"""Operations whose results `selective` keeps: the products and the attention, nearly all of a block's FLOPs."""


def _policy(_context, operation, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation) in KEPT_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE


def recomputing(mode: str, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """block(*inputs) under `mode`: none, selective (keeps `KEPT_BY_SELECTIVE`), block (keeps only the inputs).

    Dropout draws the same masks again, so results and gradients do not depend on the mode.
    """
    if mode == "none":
        return block(*inputs)
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    return checkpoint(block, *inputs, use_reentrant=False, **contexts)
