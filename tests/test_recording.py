"""Recorded forward and backward passes: the results of plain ones under DeepSpeed, and nothing recorded twice.

Where there is no GPU a stand-in takes the place of PyTorch's recording: the same memory is written by every replay.
"""

from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from npp_ds.model import ModelConfig, Transformer
from npp_ds.training import performance, preflight
from npp_ds.training.recording import record_passes
from runs import WATCHED, assert_same, outcome_of, run, tiny_config

recordings: list[tuple[int, ...]] = []
"""Shapes of the codes that the stand-in has recorded in this process."""


def stand_in(module: nn.Module, inputs: tuple[torch.Tensor, ...], **options) -> nn.Module:
    """`torch.cuda.make_graphed_callables` without a GPU: draws random numbers as its trial runs do, and answers from
    memory that the next call overwrites.
    """
    assert not torch.is_autocast_cache_enabled() and not module._forward_hooks
    recordings.append(tuple(inputs[0].shape))
    run, parameters = module.forward, tuple(module.parameters())
    run(*inputs)
    output = torch.zeros(())
    gradients = [torch.zeros_like(p) for p in parameters]

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            for place, value in zip(inputs, tensors, strict=False):
                place.copy_(value)
            with torch.enable_grad():
                ctx.loss = run(*inputs)
            return output.copy_(ctx.loss.detach()).detach()

        @staticmethod
        def backward(ctx, gradient):
            for place, value in zip(gradients, torch.autograd.grad(ctx.loss, parameters, gradient), strict=True):
                place.copy_(value)
            return (*(None for _ in inputs), *(place.detach() for place in gradients))

    module.forward = lambda *tensors: Replay.apply(*tensors, *parameters)
    return module


def recorded_run(processes, config) -> list[tuple[int, ...]]:
    recordings.clear()
    with (
        patch("torch.cuda.make_graphed_callables", stand_in),
        patch.object(performance, "check_performance", lambda config: None),
        patch.object(preflight, "check_performance", lambda config: None),
    ):
        run(processes, config)
    return recordings


@pytest.mark.parametrize(
    "zero_stage, micro_batch_size, precision",
    [(1, 4, "fp32"), (2, 4, "autocast_bf16"), pytest.param(2, 8, "bf16", marks=pytest.mark.slow)],
)
def test_a_recorded_run_equals_a_plain_one_and_records_once_a_stage(
    pair, shards, tmp_path, zero_stage, micro_batch_size, precision
):
    keys = {
        **WATCHED,
        "deepspeed": {"config": f"zero{zero_stage}"},
        "precision": precision,
        "schedule": {"micro_batch_size": micro_batch_size, "epochs": 4},
    }
    pair.run(run, tiny_config(shards, tmp_path / "plain", **keys))
    recorded = tiny_config(shards, tmp_path / "recorded", **keys, performance={"cuda_graphs": True})
    for shapes in pair.run(recorded_run, recorded):
        assert shapes == [(micro_batch_size, k, 16 // k) for k in (1, 4, 16)]
    assert_same(outcome_of(tmp_path / "recorded"), outcome_of(tmp_path / "plain"))


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


def test_losses_and_accumulated_gradients_outlive_the_replays_after_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.make_graphed_callables", stand_in)
    recordings.clear()
    model, batches = model_and_batches("cpu", SHAPES)
    expected = losses_and_gradients(model, batches)
    record_passes(model)
    found = losses_and_gradients(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert recordings == [(8, 4, 4), (8, 16, 1), (8, 4, 4)]


def test_only_passes_that_are_trained_on_are_recorded_and_moved_weights_are_noticed(monkeypatch):
    monkeypatch.setattr("torch.cuda.make_graphed_callables", stand_in)
    recordings.clear()
    model, ((codes, labels), _) = model_and_batches("cpu", [(4, 4)] * 2)
    record_passes(model)
    model.eval()
    model(codes, labels)
    model.train()
    with torch.no_grad():
        model(codes, labels)
    assert model(codes, labels, "logits").shape == (8, 4, 100) and not recordings
    before = model(codes, labels).item()
    model.norm.weight.data = torch.zeros(64)
    assert model(codes, labels).item() == pytest.approx(4.60517) != before
    assert len(recordings) == 2


@pytest.mark.skipif(torch.__version__ < "2.11", reason="PyTorch 2.8 needs a GPU's driver to index a stand-in")
def test_a_forward_pass_on_a_gpu_asks_it_for_no_value():
    """Stand-ins for a GPU's tensors have no values: whatever made the host wait for one would raise."""
    with FakeTensorMode(), torch.device("cuda"):
        codes, labels = torch.randint(100, (8, 4, 4)), torch.randint(10, (8,))
        loss = Transformer(MODEL)(codes, labels)
    assert loss.shape == () and loss.device.type == "cuda" and loss.requires_grad


@pytest.mark.gpu
def test_recorded_passes_on_a_gpu_equal_plain_ones_with_dropout():
    model, batches = model_and_batches("cuda", SHAPES)
    expected = losses_and_gradients(model, batches)
    record_passes(model)
    found = losses_and_gradients(model, batches)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert len({loss.item() for loss in found if loss.ndim == 0}) == len(batches)


@pytest.mark.gpu
def test_a_replay_makes_the_host_wait_for_nothing():
    model, batches = model_and_batches("cuda", [(4, 4)] * 2)
    record_passes(model)
    losses_and_gradients(model, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses_and_gradients(model, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
