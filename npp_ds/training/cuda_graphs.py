"""`performance.cuda_graphs`: forward and backward pass of a micro-batch as CUDA graphs, captured once per stage.

A replay of a CUDA graph starts all its kernels at once; without it the host starts them one by one. The whole model is
one node of the autograd graph: gradients reach the parameters as always, so DeepSpeed's hooks (ZeRO-1 and 2) reduce
them as always, but only when the last one is computed. A CUDA graph for each block, or
`torch.compile(mode="reduce-overhead")`, would leave hundreds of launches per step, and would let the next pass write
into the memory of gradients that DeepSpeed still holds.

`torch.cuda.make_graphed_callables` is not used: in torch 2.11 it captures in "global" mode only, and a reference cycle
keeps its CUDA graphs, with the activations of a whole stage, until the garbage collector runs.
"""

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from npp_ds.model.transformer import Transformer

WARM_UP_PASSES = 3
"""Passes before the capture, in which libraries and compilers initialize; as many as PyTorch's own captures take."""


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
