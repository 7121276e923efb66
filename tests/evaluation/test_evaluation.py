"""Evaluation: likelihood over padded batches and ranks."""

import math

import pytest
import torch
from torch import nn

from npp_ds.evaluation.likelihood import mean_nll
from npp_ds.model import ModelConfig, Transformer, patches


class Counting(nn.Module):
    """Wraps a model as an engine does, and counts calls and the mode they ran in."""

    def __init__(self, model):
        super().__init__()
        self.module, self.calls, self.eval_calls = model, 0, 0

    def forward(self, codes, labels):
        self.calls += 1
        self.eval_calls += not self.training
        return self.module(codes, labels)


@pytest.fixture(scope="module")
def model_and_data():
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=40, grid_size=4, num_classes=5, residual_dropout=0.5)
    )
    nn.init.normal_(model.output.weight, std=0.3)
    codes = patches.group(torch.randint(0, 40, (11, 16)), 2)
    return model, codes, torch.randint(0, 5, (11,))


def padded_batches(codes, labels, micro_batch_size, rank, world_size):
    """What `EvalLoader` promises: equally many full batches for every rank, `count` of whose rows are real."""
    batches = math.ceil(len(codes) / (micro_batch_size * world_size))
    for batch in range(batches):
        first = (batch * world_size + rank) * micro_batch_size
        rows = torch.arange(first, first + micro_batch_size)
        yield (
            codes[rows.clamp(max=len(codes) - 1)],
            labels[rows.clamp(max=len(codes) - 1)],
            int((rows < len(codes)).sum()),
        )


@pytest.mark.parametrize("micro_batch_size", [1, 4, 16])
def test_nll_is_the_mean_over_images_whatever_the_batch_size(model_and_data, micro_batch_size):
    model, codes, labels = model_and_data
    model.train()
    wrapped = Counting(model)
    found = mean_nll(wrapped, padded_batches(codes, labels, micro_batch_size, 0, 1), "cpu")
    assert wrapped.eval_calls == wrapped.calls == math.ceil(11 / micro_batch_size)
    assert model.training and wrapped.training
    model.eval()
    with torch.no_grad():
        log_p = model(codes, labels, output="logits").double().log_softmax(-1)
    assert found == pytest.approx(-log_p.gather(-1, codes).mean().item(), rel=1e-6)


def nll_of_rank(processes, config, state_dict, codes, labels):
    """(mean_nll, calls of the model) on one rank of the pool."""
    model = Transformer(config)
    model.load_state_dict(state_dict)
    wrapped = Counting(model)
    batches = padded_batches(codes, labels, 2, processes.rank, processes.world_size)
    return mean_nll(wrapped, batches, "cpu"), wrapped.calls


def test_nll_calls_the_model_equally_often_on_every_rank_and_sums_over_them(model_and_data, pair):
    model, codes, labels = model_and_data
    codes, labels = codes[:9], labels[:9]
    results = pair.run(nll_of_rank, model.config, model.state_dict(), codes, labels)
    assert [count for *_, count in padded_batches(codes, labels, 2, 1, 2)] == [2, 2, 0]
    expected = mean_nll(model, padded_batches(codes, labels, 9, 0, 1), "cpu")
    for found, calls in results:
        assert found == pytest.approx(expected, rel=1e-6)
        assert calls == 3


def test_nll_restores_the_mode_when_the_model_raises(model_and_data):
    model, codes, labels = model_and_data
    model.train()
    with pytest.raises((IndexError, RuntimeError)):
        mean_nll(model, [(codes + 40, labels, 11)], "cpu")
    assert model.training
