"""The config's `performance` section: what it needs, and compiled blocks, one compilation for every stage's shape.

All blocks of a model run the same code on the same shapes, so one compilation serves them all. Only forward passes in
training are compiled: the last batch of a validation has another size and would need another compilation.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor

from npp_ds.config.schema import RunConfig
from npp_ds.errors import UserError
from npp_ds.model.attention import chosen_kernel
from npp_ds.model.transformer import Block, Transformer
from npp_ds.sizes import num_positions
from npp_ds.training.cuda_graphs import use_cuda_graphs
from npp_ds.training.deepspeed_config import read_settings


def apply_performance(model: Transformer, config: RunConfig, device: torch.device) -> None:
    """Apply the section to a model that DeepSpeed does not have yet. Raises UserError.

    A change of stage needs no call: a shape is compiled and captured when it first occurs.
    """
    check_performance(config)
    if config.performance.compile:
        _check_attention_kernels(config, device)
        compile_blocks(model)
    model.output.loss_kernel = config.performance.loss_kernel
    if config.performance.cuda_graphs:
        use_cuda_graphs(model)


def check_performance(config: RunConfig) -> None:
    """Raise UserError that lists all that this machine or this config lacks for the section."""
    asked, mode = config.performance, config.model.activation_checkpointing
    zero: dict[str, Any] = read_settings(config.deepspeed.config)["zero_optimization"]
    problems = []
    for key in ("compile", "cuda_graphs"):
        if getattr(asked, key) and zero["stage"] == 3:
            problems.append(
                f"performance.{key}: ZeRO-3 (deepspeed.config {config.deepspeed.config}) gathers weights by hooks "
                f"around every layer, which it cannot include; set deepspeed.config=zero2, or performance.{key}=false"
            )
    if asked.compile and (lack := _compiler_lacks()):
        problems.append(f"performance.compile: {lack}; install it, or set performance.compile=false")
    if asked.compile and mode == "selective":
        problems.append(
            "performance.compile: compiled blocks hide their operations from model.activation_checkpointing=selective, "
            "and compute cheap ones again anyway; set that to none or block"
        )
    if asked.cuda_graphs and not torch.cuda.is_available():
        problems.append("performance.cuda_graphs: needs a CUDA device, found none; set performance.cuda_graphs=false")
    if asked.cuda_graphs and mode != "none":
        problems.append(
            f"performance.cuda_graphs: model.activation_checkpointing={mode} reads the state of the random numbers, "
            "which cannot be captured; set that to none, or performance.cuda_graphs=false"
        )
    if asked.cuda_graphs and (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        problems.append(
            "performance.cuda_graphs: zero_optimization.offload_optimizer copies gradients while the next replay "
            "overwrites them; drop that from the DeepSpeed settings, or set performance.cuda_graphs=false"
        )
    if asked.loss_kernel == "triton" and not torch.cuda.is_available():
        problems.append(
            "performance.loss_kernel: triton needs a CUDA device, found none; set performance.loss_kernel=torch"
        )
    elif asked.loss_kernel == "triton" and (lack := _compiler_lacks()):
        problems.append(f"performance.loss_kernel: triton {lack}; install it, or set performance.loss_kernel=torch")
    if problems:
        raise UserError("\n".join(problems))


def _compiler_lacks() -> str | None:
    """Return what PyTorch's compiler lacks on this machine; None when nothing."""
    if torch.cuda.is_available():
        if find_spec("triton") is None:
            return "needs the package triton, found none"
        names = [os.environ.get("CC"), "gcc", "clang", "cc"]
        return None if any(which(name) for name in names if name) else "needs a C compiler, found none on PATH"
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return None if any(which(name) for name in names if name) else "needs a C++ compiler, found none on PATH"


def _check_attention_kernels(config: RunConfig, device: torch.device) -> None:
    """Choose the kernel of every stage now: an error while a block is compiled would be hard to read."""
    shape = config.model.shape()
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    heads, kv_heads = shape["n_heads"], config.model.n_kv_heads or shape["n_heads"]
    for stage in config.stage_table():
        positions = num_positions(config.model.grid_size, stage.patch_side)
        dropout = config.model.attention_dropout * stage.dropout_scale
        call = device, dtype, positions, heads, kv_heads, shape["dim"] // heads, dropout > 0
        chosen_kernel(config.model.attention, *call)


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
