"""`performance.cuda_graphs`: forward and backward pass of a micro-batch recorded once per stage and replayed.

A replay starts all kernels at once, where the same step unrecorded waits for the host to start them one by one.
PyTorch's `make_graphed_callables` records the whole model, as one node of the autograd graph: its gradients reach the
parameters as always, so DeepSpeed's hooks (ZeRO-1 and 2) reduce them as always, though not before the last is there.
Recording block by block, or `torch.compile(mode="reduce-overhead")`, would leave hundreds of launches; and there the
memory of one pass is given to the next while DeepSpeed still holds gradients in it.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from npp_ds.model.transformer import Transformer


def record_passes(model: Transformer) -> None:
    """From now on `model(codes, labels)` replays recordings in passes that are trained on."""
    model.forward = RecordedPasses(model)


class RecordedPasses:
    """The forward pass of a model: recorded at the first micro-batch of a shape, replayed for those that follow.

    One recording is kept, since a stage's micro-batches are all of one shape; the next stage's takes its place.
    Everything but the loss of a training pass runs as it is.
    """

    def __init__(self, model: Transformer):
        self._model, self._forward = model, model.forward
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._recorded: Callable[[Tensor, Tensor], Tensor] | None = None
        self._kind: tuple[Any, ...] | None = None
        self._own_gradient: Tensor | None = None

    def __call__(self, codes: Tensor, labels: Tensor, output: str = "loss") -> Tensor:
        if output != "loss" or not (self._model.training and torch.is_grad_enabled()):
            return self._forward(codes, labels, output)
        kind = self._kind_of(codes, labels)
        if kind != self._kind:
            self._kind = self._recorded = None  # gives its memory back first
            self._recorded = _record(_Hookless(self._forward, self._parameters), codes, labels)
            self._kind = kind
        self._keep_gradients()
        return self._recorded(codes, labels).clone()  # the next replay overwrites what it returns

    def _kind_of(self, codes: Tensor, labels: Tensor) -> tuple[Any, ...]:
        """What a recording is bound to: shapes, precision, and the places of the weights."""
        device = codes.device.type
        precision = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return codes.shape, labels.shape, codes.device, precision, tuple(p.data_ptr() for p in self._parameters)

    def _keep_gradients(self) -> None:
        """Moves gradients that ZeRO-1 leaves for the next micro-batch to add to out of the recording's memory."""
        kept = [p for p in self._parameters if p.grad is not None]
        if kept and kept[0].grad is not self._own_gradient:
            for parameter in kept:
                parameter.grad = parameter.grad.clone()
            self._own_gradient = kept[0].grad


class _Hookless(nn.Module):
    """A model's forward pass and parameters without the hooks that DeepSpeed has put around the model."""

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], parameters: list[nn.Parameter]):
        super().__init__()
        self._run, self.weights = forward, nn.ParameterList(parameters)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        return self._run(codes, labels)


def _record(module: nn.Module, codes: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The module recorded for inputs like these; draws of random numbers before and after do not notice it.

    A replay draws from where the generator stands then, and moves it on. Threads beside this one may go on: the data
    loader's allocates while this one records.
    """
    device = codes.device
    options = {"capture_error_mode": "thread_local"}
    known = inspect.signature(torch.cuda.make_graphed_callables).parameters
    options = {name: value for name, value in options.items() if name in known}
    autocast = torch.autocast(
        device.type,
        torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,  # a weight's cast would otherwise outlive the recording it lies in
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), autocast, _on_one_stream():
        return torch.cuda.make_graphed_callables(module, (codes.clone(), labels.clone()), **options)


@contextmanager
def _on_one_stream() -> Iterator[None]:
    """Nodes of an autograd graph that something still holds, made on another stream, follow the one that records."""
    follow = getattr(torch.autograd.graph, "set_override_stale_capture_stream", lambda enabled: None)
    follow(True)
    try:
        yield
    finally:
        follow(False)
