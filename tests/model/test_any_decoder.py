"""Patches and the loss work on any decoder that takes embeddings: the Llama example of docs/examples, run for real."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from npp_ds.model.loss import patch_cross_entropy
from npp_ds.model.patches import group

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).parents[2] / "docs/examples/llama_causal_lm.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("llama_causal_lm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_is_under_ninety_lines():
    assert len(EXAMPLE.read_text().splitlines()) < 90


def test_loss_and_gradients_at_side_one_are_those_of_llama_itself(example):
    torch.manual_seed(0)
    model = example.build_model()
    codes, labels = example.make_codes(5, seed=1)
    ours = example.patch_loss(model, group(codes, 1), labels)
    ours.backward()
    our_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    tokens = torch.cat([example.VOCAB_SIZE + labels[:, None], codes], dim=1)
    theirs = model(input_ids=tokens, labels=tokens).loss
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(our_gradients[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("patch_side", [1, 2, 4])
def test_loss_is_the_mean_over_codes_of_the_models_own_logits(example, patch_side):
    torch.manual_seed(0)
    model = example.build_model().double()
    codes, labels = example.make_codes(3, seed=2)
    codes = group(codes, patch_side)
    table = model.get_input_embeddings().weight
    inputs = torch.cat([table[example.VOCAB_SIZE + labels][:, None], table[codes[:, :-1]].mean(2)], dim=1)
    log_p = model(inputs_embeds=inputs).logits.log_softmax(-1)
    assert example.patch_loss(model, codes, labels).item() == pytest.approx(
        -log_p.gather(-1, codes).mean().item(), rel=1e-6
    )


def test_a_stock_llama_learns_coarse_to_fine(example):
    torch.manual_seed(0)
    model = example.build_model()
    uniform = math.log(example.VOCAB_SIZE + example.NUM_CLASSES + 1)
    for patch_side, steps, reached in ((4, 40, 3.4), (2, 40, 2.9), (1, 80, 1.6)):
        losses = example.train(model, patch_side, steps)
        if patch_side == 4:
            assert losses[0] == pytest.approx(uniform, abs=0.1)
        assert losses[-1] < losses[0] - 0.3
        assert losses[-1] < reached
    codes = example.sample(model, torch.arange(4), cfg_scale=2.0)
    assert codes.shape == (4, example.GRID_SIZE**2) and codes.min() >= 0 and codes.max() < example.VOCAB_SIZE
    with torch.no_grad():
        likely = example.patch_loss(model, group(codes, 1), torch.arange(4))
        random = example.patch_loss(model, group(torch.randint(64, codes.shape), 1), torch.arange(4))
    assert likely < 2.5 < random - 1, "samples look like codes that the model knows"


def test_guided_sampling_is_that_of_logits_mixed_by_hand(example):
    """Greedy, as the guidance of transformers is the one of this project: null + scale * (class - null)."""
    torch.manual_seed(0)
    model = example.build_model().eval()
    labels = torch.tensor([0, 3])
    tokens = torch.stack([example.VOCAB_SIZE + labels, torch.full((2,), example.VOCAB_SIZE + example.NUM_CLASSES)])
    codes = torch.empty(2, 0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(example.GRID_SIZE**2):
            given, null = (model(torch.cat([t[:, None], codes], 1)).logits[:, -1].log_softmax(-1) for t in tokens)
            mixed = null + 2 * (given - null)
            codes = torch.cat([codes, mixed[:, : example.VOCAB_SIZE].argmax(-1, keepdim=True)], 1)
    model.generation_config.temperature = 1e-6
    assert torch.equal(example.sample(model, labels, 2.0), codes)


def test_padding_bias_and_sums_are_written_as_the_example_says():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 5, 8, generator=generator), torch.randn(11, 8, generator=generator)
    bias, targets = torch.randn(11, generator=generator), torch.randint(11, (3, 5, 1), generator=generator)
    targets[0, 3:] = -100
    keep = targets[..., 0] != -100
    ours = patch_cross_entropy(
        torch.cat([hidden, torch.ones(3, 5, 1)], -1)[keep], torch.cat([weight, bias[:, None]], -1), targets[keep]
    )
    logits = (hidden @ weight.T + bias).flatten(0, 1)
    theirs = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    assert (ours * keep.sum()).item() == pytest.approx(theirs.item(), rel=1e-6)
    with pytest.raises(RuntimeError, match="index -100 is out of bounds"):
        patch_cross_entropy(hidden, weight, targets)
