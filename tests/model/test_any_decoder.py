"""Patches and the loss work on any decoder that takes embeddings: the Llama example of docs/examples, run for real."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from npp_ds.model.patches import group

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).parents[2] / "docs/examples/llama_causal_lm.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("llama_causal_lm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_is_under_sixty_lines():
    assert len(EXAMPLE.read_text().splitlines()) < 60


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
    uniform = math.log(example.VOCAB_SIZE + example.NUM_CLASSES)
    for patch_side, steps, reached in ((4, 40, 3.4), (2, 40, 2.8), (1, 80, 1.6)):
        losses = example.train(model, patch_side, steps)
        if patch_side == 4:
            assert losses[0] == pytest.approx(uniform, abs=0.1)
        assert losses[-1] < losses[0] - 0.3
        assert losses[-1] < reached
