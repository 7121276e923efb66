"""The patch cross-entropy is exact and never holds more than one row of logits per position."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.patch_loss import peak_bytes
from npp_ds.model import loss as loss_module
from npp_ds.model import patch_cross_entropy


def problem(positions: int, k: int, vocab: int = 1000, dim: int = 48):
    g = torch.Generator().manual_seed(k)
    hidden = torch.randn(positions, dim, generator=g)
    weight = torch.randn(vocab, dim, generator=g) * 0.3
    return hidden, weight, torch.randint(vocab, (positions, k), generator=g)


def by_definition(hidden, weight, targets):
    """The published way, in the inputs' precision: every position's logits repeated for each of its k targets."""
    k = targets.shape[1]
    return F.cross_entropy((hidden @ weight.T).repeat_interleave(k, 0), targets.flatten())


def value_and_gradients(function, hidden, weight, targets):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = 3 * function(hidden, weight, targets)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("k", [1, 4, 16, 64])
@pytest.mark.parametrize("chunk_bytes", [1 << 14, 1 << 30], ids=["chunks", "whole"])
def test_value_and_gradients_agree_with_float64(k, chunk_bytes, monkeypatch):
    monkeypatch.setitem(loss_module.LOGITS_CHUNK_BYTES, "cpu", chunk_bytes)
    hidden, weight, targets = problem(37, k)
    expected = value_and_gradients(by_definition, hidden.double(), weight.double(), targets)
    for found, exact in zip(value_and_gradients(patch_cross_entropy, hidden, weight, targets), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("k", [1, 4, 16, 64])
def test_value_and_gradients_agree_with_float64_at_the_size_of_a_real_head(k):
    hidden, weight, targets = problem(24, k, vocab=16384, dim=256)
    weight *= 0.1
    expected = value_and_gradients(by_definition, hidden.double(), weight.double(), targets)
    for found, exact in zip(value_and_gradients(patch_cross_entropy, hidden, weight, targets), expected, strict=True):
        assert (found - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("rows_of_a_chunk", [1, 12, 15, 36, 37])
def test_chunks_of_any_length_add_up(rows_of_a_chunk, monkeypatch):
    hidden, weight, targets = problem(36, 4)
    expected = value_and_gradients(by_definition, hidden.double(), weight.double(), targets)
    monkeypatch.setitem(loss_module.LOGITS_CHUNK_BYTES, "cpu", rows_of_a_chunk * 4 * len(weight) + 3)
    for found, exact in zip(value_and_gradients(patch_cross_entropy, hidden, weight, targets), expected, strict=True):
        assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_float64_inputs_have_float64_gradients_of_a_float32_loss():
    hidden, weight, targets = problem(20, 4)
    expected = value_and_gradients(by_definition, hidden.double(), weight.double(), targets)
    found = value_and_gradients(patch_cross_entropy, hidden.double(), weight.double(), targets)
    assert [t.dtype for t in found] == [torch.float32, torch.float64, torch.float64]
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 1e-5 * e.norm()


def test_a_target_whose_probability_vanishes_has_a_finite_loss():
    """The most likely of 300 codes leads by 200 nats: the others' probabilities are below what float32 can hold."""
    hidden, weight, targets = torch.eye(2), torch.zeros(300, 2), torch.tensor([[5], [7]])
    weight[3] = 200
    expected = value_and_gradients(by_definition, hidden.double(), weight.double(), targets)
    found = value_and_gradients(patch_cross_entropy, hidden, weight, targets)
    assert found[0].item() == pytest.approx(600)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e.float())


def test_repeated_calls_have_the_same_bits():
    hidden, weight, targets = problem(300, 16)
    first, second = (value_and_gradients(patch_cross_entropy, hidden, weight, targets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient():
    hidden, weight, targets = problem(8, 4)
    loss = patch_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (3 * loss).backward()


@pytest.mark.parametrize("learns", ["hidden", "weight"])
def test_either_gradient_can_be_had_alone(learns):
    hidden, weight, targets = problem(8, 4)
    _, *both = value_and_gradients(patch_cross_entropy, hidden, weight, targets)
    inputs = {"hidden": hidden, "weight": weight}
    inputs[learns].requires_grad_()
    (3 * patch_cross_entropy(hidden, weight, targets)).backward()
    assert torch.equal(inputs[learns].grad, both[list(inputs).index(learns)])
    assert all(t.grad is None for name, t in inputs.items() if name != learns)


def test_a_compiled_region_around_it_changes_nothing():
    hidden, weight, targets = problem(30, 4)
    compiled = torch.compile(lambda *inputs: patch_cross_entropy(*inputs), backend="aot_eager", fullgraph=True)
    plain = value_and_gradients(patch_cross_entropy, hidden, weight, targets)
    for found, exact in zip(value_and_gradients(compiled, hidden, weight, targets), plain, strict=True):
        torch.testing.assert_close(found, exact)


def test_one_code_is_next_token_cross_entropy():
    hidden, weight, targets = problem(50, 1)
    assert patch_cross_entropy(hidden, weight, targets).item() == pytest.approx(
        F.cross_entropy(hidden @ weight.T, targets[:, 0]).item(), rel=1e-6
    )


def test_leading_dimensions_do_not_matter():
    hidden, weight, targets = problem(24, 4)
    flat = patch_cross_entropy(hidden, weight, targets)
    assert torch.equal(flat, patch_cross_entropy(hidden.view(2, 12, -1), weight, targets.view(2, 12, 4)))


@pytest.mark.parametrize("shape", [(2, 16), (2, 15, 1), (1, 16, 1), (32, 1), (2, 17, 1)])
def test_targets_that_do_not_fit_the_hidden_states_are_refused(shape):
    hidden, weight = torch.zeros(2, 16, 8), torch.zeros(32, 8)
    message = re.escape(f"hidden (2, 16, 8) and targets {shape}")
    with pytest.raises(ValueError, match=message):
        patch_cross_entropy(hidden, weight, torch.zeros(shape, dtype=torch.int64))


def test_repeated_codes_in_a_patch_count_as_often_as_they_stand_there():
    hidden, weight, targets = problem(8, 4)
    targets[:] = targets[:, :1]
    expected = value_and_gradients(by_definition, hidden, weight, targets[:, :1])
    for found, exact in zip(value_and_gradients(patch_cross_entropy, hidden, weight, targets), expected, strict=True):
        torch.testing.assert_close(found, exact)


def test_autocast_keeps_the_softmax_and_the_weight_gradient_in_float32():
    hidden, weight, targets = problem(64, 4)
    exact = value_and_gradients(by_definition, hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(patch_cross_entropy, hidden, weight, targets)
    assert [t.dtype for t in found] == [torch.float32] * 3
    for f, e in zip(found, exact, strict=True):
        assert 0 < (f - e).norm() <= 2e-2 * e.norm()


def test_memory_at_16_codes_is_no_more_than_at_one():
    one, many = (problem(256, k, vocab=4096) for k in (1, 16))
    for hidden, weight, _ in (one, many):
        hidden.requires_grad_(), weight.requires_grad_()
    taken = peak_bytes(patch_cross_entropy, *many)
    assert taken <= 1.02 * peak_bytes(patch_cross_entropy, *one)
    assert peak_bytes(by_definition, *many) > 5 * taken


def test_two_chunks_of_logits_and_the_gradients_are_all_that_is_allocated(monkeypatch):
    hidden, weight, targets = problem(256, 4, vocab=4096)
    chunk = 32 * 4 * len(weight)
    monkeypatch.setitem(loss_module.LOGITS_CHUNK_BYTES, "cpu", chunk)
    expected = 4 * (hidden.numel() + weight.numel()) + 2 * chunk
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    assert expected <= peak_bytes(patch_cross_entropy, hidden, weight, targets) <= 1.02 * expected


def test_without_gradients_only_the_logits_are_computed():
    hidden, weight, targets = problem(16, 4)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        value = patch_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert not value.requires_grad
    assert value.item() == pytest.approx(by_definition(hidden, weight, targets).item(), rel=1e-6)
    assert sum(event.count for event in seen.key_averages() if event.key == "aten::mm") == 1
