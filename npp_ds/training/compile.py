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
    """Prepares the model, before DeepSpeed takes it, for what the config asks for. Raises UserError.

    Nothing is to be done at a change of stage: shapes are compiled and captured as they first come.
    """
    check_performance(config)
    if config.performance.compile:
        _check_attention_kernels(config, device)
        compile_blocks(model)
    model.output.loss_kernel = config.performance.loss_kernel
    if config.performance.cuda_graphs:
        use_cuda_graphs(model)


def check_performance(config: RunConfig) -> None:
    """Raises UserError with everything that keeps this machine or this config from what `performance` asks for."""
    asked, mode = config.performance, config.model.activation_checkpointing
    zero: dict[str, Any] = read_settings(config.deepspeed.config)["zero_optimization"]
    problems = []
    for key in ("compile", "cuda_graphs"):
        if getattr(asked, key) and zero["stage"] == 3:
            problems.append(
                f"performance.{key}: ZeRO-3 (deepspeed.config {config.deepspeed.config}) gathers weights by hooks "
                f"around every layer, which it cannot take in; set deepspeed.config=zero2, or performance.{key}=false"
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
    """What PyTorch's compiler misses on this machine; None when nothing."""
    if torch.cuda.is_available():
        if find_spec("triton") is None:
            return "needs the package triton, found none"
        names = [os.environ.get("CC"), "gcc", "clang", "cc"]
        return None if any(which(name) for name in names if name) else "needs a C compiler, found none on PATH"
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return None if any(which(name) for name in names if name) else "needs a C++ compiler, found none on PATH"


def _check_attention_kernels(config: RunConfig, device: torch.device) -> None:
    """Chooses the kernel of every stage now: an error while a block is compiled would be hard to read."""
    shape = config.model.shape()
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    heads, kv_heads = shape["n_heads"], config.model.n_kv_heads or shape["n_heads"]
    for stage in config.stage_table():
        positions = num_positions(config.model.grid_size, stage.patch_side)
        call = device, dtype, positions, heads, kv_heads, shape["dim"] // heads, config.model.attention_dropout > 0
        chosen_kernel(config.model.attention, *call)


MOST_SHAPES = 64
"""Shapes that may be compiled in one process; beyond its own limit (8 in torch 2.15) PyTorch goes on uncompiled."""


def compile_blocks(model: Transformer) -> None:
    """From now on the model's blocks run compiled in forward passes that are trained on; parameter names stay.

    A stage's first forward and backward pass compile for its shape, no later one does.
    """
    dynamo = torch._dynamo.config
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    setattr(dynamo, limit, max(MOST_SHAPES, getattr(dynamo, limit)))
    torch.compiler.assume_constant_result(chosen_kernel)  # compiled code holds its answer
    compiled = torch.compile(Block.forward, dynamic=False, **how_to_compile())
    for block in model.layers:
        block.forward = partial(_forward, compiled, block)


def how_to_compile() -> dict[str, Any]:
    """Inductor's options: no kernel is chosen by a clock where that shows in the result, so a resumed run finds the
    same ones. PyTorch before 2.10 or so has no such option, and chooses anew unless its cache on disk was kept.
    """
    has_option = "deterministic" in torch._inductor.list_options()
    return {"options": {"deterministic": True}} if has_option else {}


def _forward(compiled: Callable[..., Tensor], block: Block, x: Tensor, rotary: Tensor) -> Tensor:
    forward = compiled if torch.is_grad_enabled() else Block.forward
    return forward(block, x, rotary)
