"""Activation checkpointing: a block saves fewer activations; its backward pass recomputes the others bit for bit."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
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


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation) in SAVED_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(mode: str, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return block(*inputs), with the activations saved for the backward pass that `mode` names.

    "none" saves all of them, "selective" the results of `SAVED_BY_SELECTIVE`, "block" only the block's inputs. Dropout
    masks are recomputed too, so results and gradients do not depend on the mode.
    """
    if mode == "none":
        return block(*inputs)
    if mode == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    return checkpoint(block, *inputs, use_reentrant=False)
