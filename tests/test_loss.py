"""The patch cross-entropy is exact and never holds more than one row of logits per position."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_one_code_is_next_token_cross_entropy():
    hidden, weight, targets = problem(50, 1)
    assert patch_cross_entropy(hidden, weight, targets).item() == pytest.approx(
        F.cross_entropy(hidden @ weight.T, targets[:, 0]).item(), rel=1e-6
    )


def test_leading_dimensions_do_not_matter():
    hidden, weight, targets = problem(24, 4)
    flat = patch_cross_entropy(hidden, weight, targets)
    assert torch.equal(flat, patch_cross_entropy(hidden.view(2, 12, -1), weight, targets.view(2, 12, 4)))


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


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes of tensors alive at once that operations under it made."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key):
        self.now -= self.alive.pop(key, 0)


def peak_bytes(k: int, function=patch_cross_entropy) -> int:
    hidden, weight, targets = problem(256, k, vocab=4096)
    with PeakMemory() as memory:
        value_and_gradients(function, hidden, weight, targets)
    return memory.peak


def test_memory_at_16_codes_is_no_more_than_at_one():
    assert peak_bytes(16) <= 1.01 * peak_bytes(1)
    assert peak_bytes(16, by_definition) > 5 * peak_bytes(16)


def test_without_gradients_only_the_logits_are_computed():
    hidden, weight, targets = problem(16, 4)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        value = patch_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert not value.requires_grad
    assert value.item() == pytest.approx(by_definition(hidden, weight, targets).item(), rel=1e-6)
    assert sum(event.count for event in seen.key_averages() if event.key == "aten::mm") == 1
