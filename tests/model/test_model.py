"""The transformer agrees with the published implementation and keeps its promises at every patch side."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npp_ds.model import ModelConfig, Transformer, patches
from npp_ds.sizes import SIZES, parameter_count
from published_models import published_model

SMALL = ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=50, grid_size=4, num_classes=5, ffn_multiple_of=16)


def random_batch(config: ModelConfig, patch_side: int, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(patch_side)
    codes = torch.randint(config.vocab_size, (batch, config.grid_size**2), generator=generator)
    return patches.group(codes, patch_side), torch.randint(config.num_classes + 1, (batch,), generator=generator)


@pytest.mark.parametrize("name", ["gpt_small", "gpt_gqa"])
@pytest.mark.parametrize("patch_side", [1, 2, 4, 8])
def test_agrees_with_published_code(name, patch_side):
    model, vectors = published_model(name)
    codes = patches.group(torch.from_numpy(vectors["codes"].astype(np.int64)), patch_side)
    labels = torch.from_numpy(vectors["labels"])

    logits = model(codes, labels, output="logits").detach().numpy()
    expected = vectors[f"logits_p{patch_side}"]
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()

    loss = model(codes, labels)
    loss.backward()
    assert loss.item() == pytest.approx(float(vectors[f"loss_p{patch_side}"]), rel=1e-5)
    parameters = dict(model.named_parameters())
    norms = {k.split("/")[1]: float(v) for k, v in vectors.items() if k.startswith(f"gradnorm_p{patch_side}/")}
    assert len(norms) == 4
    for parameter, norm in norms.items():
        assert parameters[parameter].grad.norm().item() == pytest.approx(norm, rel=1e-5), parameter


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_group_cuts_squares_in_raster_order_and_ungroup_undoes_it(coarse, patch_side, batch):
    grid = coarse * patch_side
    codes = torch.arange(batch * grid * grid).view(batch, grid * grid)
    grouped = patches.group(codes, patch_side)
    square = codes.view(batch, grid, grid)
    for i in range(coarse * coarse):
        top, left = i // coarse * patch_side, i % coarse * patch_side
        patch = square[:, top : top + patch_side, left : left + patch_side]
        assert torch.equal(grouped[:, i], patch.flatten(1))
    assert torch.equal(patches.ungroup(grouped, patch_side), codes)


def test_codes_that_form_no_grid_are_refused():
    with pytest.raises(ValueError, match="15 codes do not form a square"):
        patches.group(torch.zeros(1, 15, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="6x6 grid cannot be cut into patches of side 4"):
        patches.group(torch.zeros(1, 36, dtype=torch.long), 4)
    with pytest.raises(ValueError, match="hold 4 codes, not 9"):
        patches.ungroup(torch.zeros(1, 4, 9, dtype=torch.long), 2)
    model = Transformer(SMALL)
    for n in (3, 25):
        with pytest.raises(ValueError, match="do not fit a model of a 4x4 grid"):
            model(torch.zeros(1, n, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="neither 'loss' nor 'logits'"):
        model(*random_batch(SMALL, 1), output="probs")


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="dim 33"):
        ModelConfig(dim=33, n_layers=1, n_heads=1)
    with pytest.raises(ValueError, match="n_kv_heads 3"):
        ModelConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=3)


@pytest.mark.parametrize("patch_side", [1, 2, 4])
def test_fresh_model_gives_every_code_the_same_probability(patch_side):
    assert Transformer(SMALL)(*random_batch(SMALL, patch_side)).item() == pytest.approx(math.log(50), abs=1e-6)


def test_loss_and_logits_are_the_same_in_train_and_eval_mode_without_dropout():
    model, _ = published_model("gpt_gqa")
    codes, labels = random_batch(model.config, 2)
    for output in ("loss", "logits"):
        assert torch.equal(model.train()(codes, labels, output=output), model.eval()(codes, labels, output=output))


@pytest.mark.parametrize("which", ["token_dropout", "residual_dropout", "ffn_dropout", "attention_dropout"])
def test_each_dropout_acts_in_train_mode_only(which):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SMALL.__dict__, which: 0.5}))
    torch.nn.init.normal_(model.output.weight)
    codes, labels = random_batch(SMALL, 1)
    model.eval()
    assert torch.equal(model(codes, labels), model(codes, labels))
    model.train()
    assert not torch.equal(model(codes, labels), model(codes, labels))


def test_positions_at_patch_centers_change_coarse_stages_only():
    paper, vectors = published_model("gpt_small")
    centers = Transformer(replace(paper.config, coarse_positions="centers")).eval()
    centers.load_state_dict(paper.state_dict())
    codes, labels = torch.from_numpy(vectors["codes"].astype(np.int64)), torch.from_numpy(vectors["labels"])
    for patch_side, positions in ((1, 40), (2, 16)):
        grouped = patches.group(codes, patch_side)
        logits, before = (model(grouped, labels, output="logits") for model in (centers, paper))
        assert torch.equal(logits, before) == (patch_side == 1)
        cache = centers.new_cache(len(codes), centers.config.grid_size // patch_side, torch.float32, "cpu", patch_side)
        for i in range(positions):
            step = centers.decode_step(labels if i == 0 else grouped[:, i - 1], i, cache)
            torch.testing.assert_close(step, logits[:, i], rtol=1e-4, atol=1e-4)


def test_a_position_sees_its_class_and_earlier_patches_only():
    model, _ = published_model("gpt_small")
    codes, labels = random_batch(model.config, 2)
    before = model(codes, labels, output="logits")
    changed = codes.clone()
    changed[:, 5] = (changed[:, 5] + 1) % model.config.vocab_size
    after = model(changed, labels, output="logits")
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(dim=-1).any()
    other_class = model(codes, (labels + 1) % model.config.num_classes, output="logits")
    assert not torch.isclose(before, other_class).all(dim=-1).any()


def test_parameter_counts_are_the_published_ones():
    assert {name: round(parameter_count(**s) / 1e6) for name, s in SIZES.items()} == {
        "B": 111, "L": 343, "XL": 775, "1B": 1014, "XXL": 1411, "2B": 1932,
    }  # fmt: skip
    built = sum(p.numel() for p in Transformer(SMALL).parameters())
    assert built == parameter_count(32, 2, 2, vocab_size=50, num_classes=5, ffn_multiple_of=16)


def test_fresh_weights_are_normal_with_standard_deviation_0_02_and_a_zero_head():
    model = Transformer(ModelConfig(dim=128, n_layers=2, n_heads=2, vocab_size=300, ffn_multiple_of=32))
    for name, p in model.named_parameters():
        if name == "output.weight":
            assert not p.any()
        elif p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.03), name
        else:
            assert torch.equal(p, torch.ones_like(p)), name
