"""`performance.compile`: the transformer's blocks compiled by PyTorch, once for every stage's shape.

All blocks of a model run the same code on the same shapes, so one compilation serves them all. Only forward passes that
are trained on are compiled: validation has a last batch of another size, and would compile anew for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from npp_ds.model.attention_kernels import chosen_kernel
from npp_ds.model.transformer import Block, Transformer

MOST_SHAPES = 64
"""Shapes that may be compiled in one process; beyond its own limit (8 in torch 2.15) PyTorch stops compiling."""


def compile_blocks(model: Transformer) -> None:
    """Make the model's blocks run compiled in forward passes that are trained on; parameter names stay.

    The first forward and backward pass of a stage compile for its shape; no later one compiles.
    """
    dynamo = torch._dynamo.config
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    setattr(dynamo, limit, max(MOST_SHAPES, getattr(dynamo, limit)))
    torch.compiler.assume_constant_result(chosen_kernel)  # compiled code holds its answer
    compiled: Callable[..., Tensor] = torch.compile(Block.forward, dynamic=False, **how_to_compile())
    for block in model.layers:
        block.forward = partial(_forward, partial(compiled, block), block.forward)


def how_to_compile() -> dict[str, Any]:
    """Return the options of `torch.compile` under which a resumed run uses the same kernels.

    Inductor then chooses no kernel by its time where the result depends on it. PyTorch before 2.10 or so has no such
    option; it chooses again unless its cache on disk was kept.
    """
    has_option = "deterministic" in torch._inductor.list_options()
    return {"options": {"deterministic": True}} if has_option else {}


def _forward(compiled: Callable[..., Tensor], eager: Callable[..., Tensor], x: Tensor, rotary: Tensor) -> Tensor:
    return (compiled if torch.is_grad_enabled() else eager)(x, rotary)
