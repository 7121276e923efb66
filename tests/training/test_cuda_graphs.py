"""CUDA graphs of forward and backward pass: the results of plain passes, with and without DeepSpeed.

Where there is no GPU, stand-ins for PyTorch's classes replay the operations of a capture, on the same memory.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Event, Thread
from typing import Any, ClassVar
from unittest.mock import Mock, patch
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from npp_ds.data.loader import StageLoader
from npp_ds.data.store import stage as stage_shards
from npp_ds.model import ModelConfig, Transformer
from npp_ds.training import performance as compiling
from npp_ds.training import preflight
from npp_ds.training.engine import TrainingEngine
from npp_ds.training.performance import use_cuda_graphs
from runs import WATCHED, assert_same, outcome_of, run, tiny_config


class StandInGraph:
    """`torch.cuda.CUDAGraph` on a CPU. `live_at_creation` has the number of others that were alive, for each one."""

    live: ClassVar[WeakSet["StandInGraph"]] = WeakSet()
    live_at_creation: ClassVar[list[int]] = []

    def __init__(self):
        self.live_at_creation.append(len(self.live))
        self.live.add(self)
        self.operations: list[tuple[Callable[..., Any], tuple, dict, Any]] = []

    def pool(self) -> str:
        return "pool"

    @torch.no_grad()
    def replay(self) -> None:
        with torch.autocast("cpu", enabled=False):
            for operation, inputs, options, outputs in self.operations:
                for new, old in zip(tree_leaves(operation(*inputs, **options)), tree_leaves(outputs), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class StandInCapture(TorchDispatchMode):
    """`torch.cuda.graph` on a CPU. `modes` has the error mode of each capture."""

    modes: ClassVar[list[str]] = []

    def __init__(self, graph: StandInGraph, pool=None, stream=None, capture_error_mode="global"):
        super().__init__()
        assert not torch.is_autocast_cache_enabled()
        self.modes.append(capture_error_mode)
        self.graph = graph

    def __torch_dispatch__(self, operation, types, inputs=(), options=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "the host waits for a value"
        outputs = operation(*inputs, **(options or {}))
        call = inputs, options or {}, outputs
        self.graph.operations.append((operation, *tree_map_only(torch.Tensor, torch.Tensor.detach, call)))
        return outputs


@contextmanager
def stand_ins() -> Iterator[list[int]]:
    """Stand-ins in the place of PyTorch's CUDA graphs, garbage collected on request only; yields `live_at_creation`."""
    StandInGraph.live.clear()
    StandInGraph.live_at_creation.clear()
    StandInCapture.modes.clear()
    classes = {"CUDAGraph": StandInGraph, "graph": StandInCapture}
    gc.disable()
    try:
        with patch.multiple("torch.cuda", **classes, Stream=Mock(), current_stream=Mock(), stream=nullcontext):
            yield StandInGraph.live_at_creation
    finally:
        gc.enable()


@contextmanager
def allowed_without_a_gpu() -> Iterator[list[int]]:
    with (
        stand_ins() as live_at_creation,
        patch.object(compiling, "check_performance", lambda config: None),
        patch.object(preflight, "check_performance", lambda config: None),
    ):
        yield live_at_creation


def run_with_graphs(processes, config) -> list[int]:
    with allowed_without_a_gpu() as live_at_creation:
        run(processes, config)
    return list(live_at_creation)


@pytest.mark.parametrize(
    "zero_stage, micro_batch_size, precision",
    [(1, 4, "fp32"), (2, 4, "autocast_bf16"), pytest.param(2, 8, "bf16", marks=pytest.mark.slow)],
)
def test_a_run_with_cuda_graphs_equals_a_plain_one_and_keeps_those_of_one_stage(
    pair, shards, tmp_path, zero_stage, micro_batch_size, precision
):
    keys = {
        **WATCHED,
        "deepspeed": {"config": f"zero{zero_stage}"},
        "precision": precision,
        "schedule": {"micro_batch_size": micro_batch_size, "epochs": 4},
    }
    pair.run(run, tiny_config(shards, tmp_path / "plain", **keys))
    graphed = tiny_config(shards, tmp_path / "graphed", **keys, performance={"cuda_graphs": True})
    for live_at_creation in pair.run(run_with_graphs, graphed):
        assert live_at_creation == [0, 1] * 3, "two in each stage, none from the stage before"
    assert_same(outcome_of(tmp_path / "graphed"), outcome_of(tmp_path / "plain"))


def parameters_with_gradient_nodes(model: nn.Module) -> list[str]:
    """Names of parameters whose AccumulateGrad node is alive: one that is not is created anew each time."""
    for parameter in model.parameters():
        torch.autograd.graph.get_gradient_edge(parameter).node.metadata["seen"] = True
    nodes = {name: torch.autograd.graph.get_gradient_edge(p).node for name, p in model.named_parameters()}
    return [name for name, node in nodes.items() if "seen" in node.metadata]


def nodes_after_initialization_and_a_step(processes, config) -> list[list[str]]:
    stage = config.build_schedule(160).stages[0]
    with allowed_without_a_gpu():
        engine = TrainingEngine(config, stage, processes)
        found = [parameters_with_gradient_nodes(engine.engine.module)]
        engine.step(0, [(torch.zeros(8, 1, 16, dtype=torch.long), torch.zeros(8, dtype=torch.long))], 1e-3)
        return [*found, parameters_with_gradient_nodes(engine.engine.module)]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_no_gradient_node_outlives_the_stream_that_it_was_created_on(pair, shards, tmp_path, zero_stage):
    keys = {
        "deepspeed": {"config": f"zero{zero_stage}"},
        "performance": {"cuda_graphs": True},
        "schedule": {"micro_batch_size": 8},
    }
    config = tiny_config(shards, tmp_path, **keys)
    assert pair.run(nodes_after_initialization_and_a_step, config) == [[[], []]] * 2


MODEL = ModelConfig(
    dim=64, n_layers=2, n_heads=2, vocab_size=100, grid_size=4, num_classes=10, ffn_multiple_of=32,
    token_dropout=0.1, residual_dropout=0.1, ffn_dropout=0.1,
)  # fmt: skip


def model_and_batches(device: str, shapes: list[tuple[int, int]]) -> tuple[Transformer, list]:
    torch.manual_seed(0)
    model = Transformer(MODEL)
    nn.init.normal_(model.output.weight, std=0.1)
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randint(100, (8, positions, area), generator=generator).to(device),
            torch.randint(10, (8,), generator=generator).to(device),
        )
        for positions, area in shapes
    ]
    return model.to(device), batches


def losses_and_gradients(model: Transformer, batches: list) -> list[torch.Tensor]:
    """Two micro-batches at a time, their gradients added up; each pass with a seed of its own."""
    found = []
    for first in range(0, len(batches), 2):
        model.zero_grad()
        losses = []
        for index in (first, first + 1):
            torch.manual_seed(index)
            device = batches[index][0].device.type
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                losses.append(model(*batches[index]))
            losses[-1].backward()
        found += [*(loss.detach() for loss in losses), *(p.grad.clone() for p in model.parameters())]
    return found


SHAPES = [(4, 4)] * 6 + [(16, 1)] * 4 + [(4, 4)] * 2


def test_losses_and_accumulated_gradients_outlive_the_replays_after_them():
    model, batches = model_and_batches("cpu", SHAPES)
    expected = losses_and_gradients(model, batches)
    use_cuda_graphs(model)
    with stand_ins() as live_at_creation:
        found = losses_and_gradients(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert live_at_creation == [0, 1] * 3, "captured at each change of shape"


def test_a_capture_leaves_other_threads_free():
    model, batches = model_and_batches("cpu", [(4, 4)] * 2)
    use_cuda_graphs(model)
    with stand_ins():
        losses_and_gradients(model, batches)
    assert StandInCapture.modes == ["thread_local"] * 2


def test_only_passes_that_are_trained_on_are_captured_and_moved_weights_and_other_dropout_are_noticed():
    model, ((codes, labels), _) = model_and_batches("cpu", [(4, 4)] * 2)
    use_cuda_graphs(model)
    with stand_ins() as live_at_creation:
        model.eval()
        model(codes, labels)
        model.train()
        with torch.no_grad():
            model(codes, labels)
        assert model(codes, labels, "logits").shape == (8, 4, 100) and not live_at_creation
        before = model(codes, labels).item()
        model.norm.weight.data = torch.zeros(64)
        assert model(codes, labels).item() == pytest.approx(4.60517) != before
        assert live_at_creation == [0, 1] * 2
        model.scale_dropout(0)
        model(codes, labels)
        assert live_at_creation == [0, 1] * 3


@pytest.mark.skipif(torch.__version__ < "2.11", reason="PyTorch 2.8 needs a GPU's driver to index a stand-in")
def test_a_forward_pass_on_a_gpu_asks_it_for_no_value():
    """Stand-ins for a GPU's tensors have no values: whatever made the host wait for one would raise."""
    with FakeTensorMode(), torch.device("cuda"):
        codes, labels = torch.randint(100, (8, 4, 4)), torch.randint(10, (8,))
        loss = Transformer(MODEL)(codes, labels)
    assert loss.shape == () and loss.device.type == "cuda" and loss.requires_grad


def assert_close_to_plain(model: Transformer, batches: list, expected: list[torch.Tensor]) -> None:
    found = losses_and_gradients(model, batches)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert len({loss.item() for loss in found if loss.ndim == 0}) == len(batches)


@pytest.mark.gpu
def test_cuda_graphs_on_a_gpu_equal_plain_passes_with_dropout():
    model, batches = model_and_batches("cuda", SHAPES)
    expected = losses_and_gradients(model, batches)
    use_cuda_graphs(model)
    assert_close_to_plain(model, batches, expected)


@pytest.mark.gpu
def test_a_loader_that_pins_memory_does_not_invalidate_a_capture(shards, tmp_path):
    model, batches = model_and_batches("cuda", SHAPES)
    expected = losses_and_gradients(model, batches)
    use_cuda_graphs(model)
    config = tiny_config(shards, tmp_path, schedule={"epochs": 1_000_000})
    store, stage = stage_shards(shards / "train", tmp_path), config.build_schedule(160).stages[0]
    kept, finished = [], Event()

    def load() -> None:
        options = {"seed": 0, "class_dropout": 0.1, "num_classes": 10, "rank": 0, "world_size": 1}
        with StageLoader(store, stage, **options, first_step=0) as loader:
            while not finished.is_set():
                kept.append(next(loader))  # or the next batch would find pinned memory that is free

    thread = Thread(target=load)
    thread.start()
    try:
        before = len(kept)
        assert_close_to_plain(model, batches, expected)
        assert thread.is_alive() and len(kept) > before
    finally:
        finished.set()
        thread.join()


@pytest.mark.gpu
def test_a_replay_makes_the_host_wait_for_nothing():
    model, batches = model_and_batches("cuda", [(4, 4)] * 2)
    use_cuda_graphs(model)
    losses_and_gradients(model, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses_and_gradients(model, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
