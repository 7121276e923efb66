"""The config's `performance` section: what it needs, compiled blocks, and CUDA graphs of a micro-batch."""

import gc
import os
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from npp_ds.config.schema import RunConfig
from npp_ds.errors import UserError
from npp_ds.model.attention import chosen_kernel
from npp_ds.model.transformer import Block, Transformer
from npp_ds.sizes import num_positions
from npp_ds.training.deepspeed_config import read_settings

MOST_SHAPES = 64
"""Shapes that may be compiled in one process; beyond its own limit (8 in torch 2.15) PyTorch stops compiling."""
WARM_UP_PASSES = 3
"""Passes before a capture, in which libraries and compilers initialize; as many as PyTorch's own captures take."""


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


def compile_blocks(model: Transformer) -> None:
    """Make the model's blocks run compiled in forward passes that are trained on; parameter names stay.

    All blocks run the same code on the same shapes, so one compilation serves them all: that in the first forward and
    backward pass of a stage. Other forward passes are not compiled: the last batch of a validation has another size.
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


def use_cuda_graphs(model: Transformer) -> None:
    """Make `model(codes, labels)` replay CUDA graphs in passes that are trained on."""
    model.forward = GraphedForward(model)  # type: ignore[method-assign]  # calls and hooks of the module stay


def free_gradient_nodes(parameters: Iterable[nn.Parameter]) -> None:
    """Detach the views of parameters that DeepSpeed (0.19.8, ZeRO-1 and 2) keeps; their memory stays the same.

    The autograd graph of such a view keeps the parameter's AccumulateGrad node, which belongs to the stream that it was
    created on. A capture on another stream would have to wait for that stream, which CUDA refuses.
    """
    for parameter in parameters:
        if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            mapping.lp_fragment = mapping.lp_fragment.detach()


class GraphedForward:
    """The forward pass of a model: captured at the first micro-batch of a shape, replayed at those that follow.

    A replay starts all kernels at once; without it the host starts them one by one. The whole model is one node of the
    autograd graph: gradients reach the parameters as always, so DeepSpeed's hooks (ZeRO-1 and 2) reduce them as always,
    but only when the last one is computed. A CUDA graph for each block, or `torch.compile(mode="reduce-overhead")`,
    would leave hundreds of launches per step, and would let the next pass write into the memory of gradients that
    DeepSpeed still holds. `torch.cuda.make_graphed_callables` is not used: in torch 2.11 it captures in "global" mode
    only, and a reference cycle keeps its CUDA graphs, with a stage's activations, until the garbage collector runs.

    The CUDA graphs of one shape are kept, since all micro-batches of a stage have the same. Whatever is not the loss of
    a training pass runs without CUDA graphs.
    """

    def __init__(self, model: Transformer):
        self._model, self._forward = model, model.forward
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._captured: CapturedPass | None = None
        self._key: tuple[Any, ...] | None = None
        self._own_gradient: Tensor | None = None

    def __call__(self, codes: Tensor, labels: Tensor, output: str = "loss") -> Tensor:
        if output != "loss" or not (self._model.training and torch.is_grad_enabled()):
            return self._forward(codes, labels, output)
        key = self._key_of(codes, labels)
        if key != self._key:
            self._key = self._captured = None
            gc.collect()  # frees its memory now, also where frames of a compiler hold it in a reference cycle
            self._captured = CapturedPass(self._forward, self._parameters, codes, labels)
            self._key = key
        self._keep_gradients()
        return _Replay.apply(self._captured, codes, labels, *self._parameters)

    def _key_of(self, codes: Tensor, labels: Tensor) -> tuple[Any, ...]:
        """Return what a CUDA graph is bound to: shapes, precision, dropout, and the addresses of the weights."""
        device = codes.device.type
        precision = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        settings = *precision, self._model.dropout_scale
        return codes.shape, labels.shape, codes.device, settings, tuple(p.data_ptr() for p in self._parameters)

    def _keep_gradients(self) -> None:
        """Copy gradients that ZeRO-1 accumulates over micro-batches out of the memory that a replay overwrites."""
        kept = [(p, p.grad) for p in self._parameters if p.grad is not None]
        if kept and kept[0][1] is not self._own_gradient:
            for parameter, gradient in kept:
                parameter.grad = gradient.clone()
            self._own_gradient = kept[0][0].grad


class CapturedPass:
    """Forward and backward pass as two CUDA graphs, with the tensors that they read and write.

    The state of the random numbers is the same after the capture as before. A replay reads the state as it then is, and
    advances it. The capture is "thread_local": the data loader's thread may pin memory meanwhile, which would
    invalidate a "global" one.
    """

    def __init__(self, forward: Callable[..., Tensor], parameters: list[nn.Parameter], codes: Tensor, labels: Tensor):
        self.codes, self.labels, device = codes.clone(), labels.clone(), codes.device
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        capture = partial(torch.cuda.graph, stream=stream, capture_error_mode="thread_local")
        autocast = torch.autocast(
            device.type,
            torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
            cache_enabled=False,  # or a weight's cast would outlive the CUDA graph whose memory it is in
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), autocast:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_PASSES):
                    torch.autograd.grad(forward(self.codes, self.labels), parameters)
            with capture(self.forward):
                loss = forward(self.codes, self.labels)
            self.loss, self.loss_gradient = loss.detach(), torch.ones_like(loss)
            with capture(self.backward, pool=self.forward.pool()):
                self.gradients = torch.autograd.grad(loss, parameters, self.loss_gradient)


class _Replay(torch.autograd.Function):
    """Loss [] of a micro-batch as a function of the parameters, computed by a `CapturedPass`.

    The gradients are in the memory of the CUDA graph: the next replay overwrites them.
    """

    @staticmethod
    def forward(ctx: Any, captured: CapturedPass, codes: Tensor, labels: Tensor, *parameters: Tensor) -> Tensor:
        ctx.captured = captured
        captured.codes.copy_(codes)
        captured.labels.copy_(labels)
        captured.forward.replay()
        return captured.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.captured.loss_gradient.copy_(gradient)
        ctx.captured.backward.replay()
        return None, None, None, *(g.detach() for g in ctx.captured.gradients)
