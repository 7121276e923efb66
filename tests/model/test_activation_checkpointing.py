"""Activation checkpointing changes which activations are saved, and no result."""

from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.allocations import allocations
from npp_ds.config.schema import ModelSection, RunConfig
from npp_ds.model import ModelConfig, Transformer
from npp_ds.planning.memory import activations
from runs import assert_same, outcome_of, run, tiny_config

MODES = ("none", "selective", "block")
CONFIG = ModelConfig(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, grid_size=4, num_classes=10, ffn_multiple_of=32,
    token_dropout=0.1, residual_dropout=0.1, ffn_dropout=0.1, attention_dropout=0.1,
)  # fmt: skip


def model_and_batch(config: ModelConfig) -> tuple[Transformer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    return model, torch.randint(100, (8, 16, 1)), torch.randint(10, (8,))


def loss_and_gradients(mode: str, autocast: bool) -> dict[str, torch.Tensor]:
    """Return loss and gradients of one step with dropout."""
    model, codes, labels = model_and_batch(replace(CONFIG, activation_checkpointing=mode))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(codes, labels)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def bytes_kept(mode: str) -> tuple[int, int]:
    """Return (bytes that an fp32 forward pass saves for the backward pass, bytes expected by `npp plan`)."""
    keys = {"attention_dropout": 0.0, "activation_checkpointing": mode}
    model, codes, labels = model_and_batch(replace(CONFIG, **keys))
    kept = []
    changes = allocations(lambda: kept.append(model(codes, labels)))
    assert kept[0].requires_grad
    sizes = {k: v for k, v in asdict(CONFIG).items() if k in ModelSection.model_fields}
    run = RunConfig.model_validate(
        {"model": {**sizes, **keys}, "data": {"train": "unused"}, "precision": "fp32"},
    )
    rows = codes.numel()
    return sum(change for _, change in changes), activations(run, rows, "cpu").forward + 4 * CONFIG.dim * (100 + rows)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["selective", "block"])
def test_checkpointing_gives_the_same_loss_and_gradients_bit_for_bit_with_dropout(mode, autocast):
    expected, found = loss_and_gradients("none", autocast), loss_and_gradients(mode, autocast)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(value.any() for name, value in found.items() if "wqkv" in name)


def test_checkpointing_saves_fewer_bytes_and_as_many_as_expected():
    kept, expected = zip(*map(bytes_kept, MODES), strict=True)
    assert kept == pytest.approx(expected, rel=0.1)
    assert kept[1] < 0.6 * kept[0]
    assert kept[2] < 0.2 * kept[0]


def test_an_evaluation_without_gradients_is_the_same_in_every_mode():
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    torch.nn.init.normal_(model.output.weight, std=0.1)
    codes, labels = torch.randint(100, (2, 16, 1)), torch.randint(10, (2,))
    losses = []
    for mode in MODES:
        model.config = replace(CONFIG, activation_checkpointing=mode)
        with torch.no_grad():
            losses.append(model(codes, labels).item())
    assert len(set(losses)) == 1


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_checkpointing_trains_bit_for_bit_the_same_under_deepspeed(pair, shards, tmp_path, zero_stage):
    outcomes = {}
    for mode in MODES:
        config = tiny_config(
            shards,
            tmp_path / mode,
            model={"activation_checkpointing": mode},
            schedule={"epochs": 2, "patch_sides": [2, 1]},
            validation={"every": 0},
            deepspeed={"config": f"zero{zero_stage}"},
            precision="autocast_bf16",
        )
        pair.run(run, config)
        outcomes[mode] = outcome_of(tmp_path / mode)
    assert_same(outcomes["selective"], outcomes["none"])
    assert_same(outcomes["block"], outcomes["none"])
