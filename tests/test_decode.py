"""Decoding: greedy parity with the published sampler, cache = full forward, draws that follow the softmax and depend
only on (seed, index).
"""

import copy

import numpy as np
import pytest
import torch

from npp_ds.errors import UserError
from npp_ds.model import patches
from npp_ds.sampling.decode import choose, generate, keep_likely
from npp_ds.sampling.noise import gumbel, noise_keys
from published_models import published_model


@pytest.fixture(scope="module")
def small():
    return published_model("gpt_small")


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_greedy_codes_equal_the_published_sampler(small, cfg_scale):
    model, vectors = small
    labels = torch.from_numpy(vectors["sample_labels"])
    codes = generate(model, labels, torch.arange(4), seed=0, cfg_scale=cfg_scale, temperature=0)
    np.testing.assert_array_equal(codes.numpy(), vectors[f"greedy_cfg{cfg_scale}"])


@pytest.mark.parametrize("name", ["gpt_small", "gpt_gqa"])
@pytest.mark.parametrize("patch_side", [1, 2, 4])
def test_cached_logits_equal_the_full_forward(name, patch_side):
    model, vectors = published_model(name)
    codes = patches.group(torch.from_numpy(vectors["codes"].astype(np.int64)), patch_side)[:, :40]
    labels = torch.from_numpy(vectors["labels"])
    grid = model.config.grid_size // patch_side
    cache = model.new_cache(len(codes), grid * grid, torch.float32, "cpu")
    inputs = [labels, *codes[:, :-1].unbind(1)]
    with torch.no_grad():
        logits = torch.stack([model.decode_step(x, i, grid, cache) for i, x in enumerate(inputs)], dim=1).numpy()
    np.testing.assert_allclose(logits, vectors[f"logits_p{patch_side}"][:, :40], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch_side", [1, 2, 4])
def test_greedy_codes_of_grouped_query_attention_equal_the_full_forward_argmax(patch_side):
    model, _ = published_model("gpt_gqa")
    labels = torch.tensor([3, 0])
    codes = patches.group(
        generate(model, labels, torch.arange(2), seed=0, temperature=0, patch_side=patch_side), patch_side
    )
    assert (codes == codes[..., :1]).all()
    with torch.no_grad():
        expected = model(codes, labels, output="logits").argmax(-1)
    assert torch.equal(codes[..., 0], expected)
    assert len(codes[..., 0].unique()) > 3


def test_image_depends_only_on_seed_and_index(small):
    model, _ = small
    labels, indices = torch.arange(12) % 10, torch.arange(100, 112)
    options = {"seed": 5, "cfg_scale": 1.7, "top_p": 0.95}
    whole = generate(model, labels, indices, **options)
    for chosen in ([7], [3, 11, 0], list(range(11, -1, -1))):
        assert torch.equal(generate(model, labels[chosen], indices[chosen], **options), whole[chosen])
    assert len(whole.unique(dim=0)) == 12
    assert not torch.equal(generate(model, labels, indices, **{**options, "seed": 6}), whole)
    same_label = generate(model, torch.zeros(12, dtype=torch.int64), indices, **options)
    assert len(same_label.unique(dim=0)) == 12


def test_draws_follow_the_softmax():
    draws, vocab = 200_000, 40
    logits = torch.linspace(0, 6, vocab)
    keys = noise_keys(3, torch.arange(draws // 50), 50).flatten(0, 1)
    counts = torch.bincount(choose(logits.expand(draws, vocab), keys, 0.8, 0, 1.0), minlength=vocab)
    expected = (logits / 0.8).softmax(0) * draws
    common = expected > 10
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    degrees = int(common.sum()) - 1
    assert degrees > 25
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


def test_noise_is_gumbel_and_uncorrelated_between_positions_images_and_entries():
    images, positions, vocab = 64, 64, 512
    noise = gumbel(noise_keys(0, torch.arange(images), positions).flatten(0, 1), vocab).double()
    noise = noise.view(images, positions, vocab)
    count = noise.numel()
    assert noise.isfinite().all()
    assert abs(noise.mean() - np.euler_gamma) < 5 * noise.std() / count**0.5
    assert abs(noise.var() - np.pi**2 / 6) < 0.01
    tail = (noise > 8).double().sum().item()
    assert abs(tail - count * (1 - np.exp(-np.exp(-8)))) < 5 * tail**0.5
    centred = (noise - noise.mean()) / noise.std()
    for a, b in [
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
        (centred[1:, 1:], centred[:-1, :-1]),
        (centred[1:, :-1], centred[:-1, 1:]),
    ]:
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5


def test_noise_is_the_same_in_every_version():
    values = gumbel(noise_keys(1, torch.tensor([0, 2**40]), 2)[:, 1], 3)
    pinned = torch.tensor([[-0.3115814, 1.6754042, 1.8574945], [-0.8020843, 0.84930, 0.2343103]])
    torch.testing.assert_close(values, pinned, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_noise_and_greedy_codes_on_cuda_equal_those_on_the_cpu(small):
    model, vectors = small
    keys = noise_keys(1, torch.arange(50), 4).flatten(0, 1)
    torch.testing.assert_close(gumbel(keys.cuda(), 512).cpu(), gumbel(keys, 512), rtol=1e-5, atol=1e-5)
    labels, indices = torch.from_numpy(vectors["sample_labels"]).cuda(), torch.arange(4).cuda()
    codes = generate(copy.deepcopy(model).cuda(), labels, indices, seed=0, cfg_scale=2.0, temperature=0)
    np.testing.assert_array_equal(codes.cpu().numpy(), vectors["greedy_cfg2.0"])


def test_top_k_and_top_p_keep_the_smallest_sufficient_set():
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.97, 0.01, 0.01, 0.01]]).log()
    assert keep_likely(logits, 2, 1.0).isfinite().tolist() == [[False, True, True, False], [True, True, True, True]]
    assert keep_likely(logits, 0, 0.7).isfinite().tolist() == [[False, True, True, False], [True, False, False, False]]
    assert keep_likely(logits, 0, 0.01).isfinite().sum(1).tolist() == [1, 1]
    assert keep_likely(logits, 1, 0.99)[0].isfinite().tolist() == [False, True, False, False]
    assert torch.equal(keep_likely(logits, 0, 1.0), logits)


def test_top_k_of_one_is_greedy(small):
    model, vectors = small
    labels = torch.from_numpy(vectors["sample_labels"])
    codes = generate(model, labels, torch.arange(4), seed=9, top_k=1)
    np.testing.assert_array_equal(codes.numpy(), vectors["greedy_cfg1.0"])


def test_every_bad_option_is_named_at_once(small):
    model, _ = small
    with pytest.raises(UserError) as error:
        generate(
            model,
            torch.tensor([11]),
            torch.tensor([0]),
            seed=0,
            temperature=-1,
            top_k=-2,
            top_p=0,
            patch_side=3,
            cfg_scale=-1,
        )
    for word in ("labels", "temperature", "top_k", "top_p", "patch_side", "cfg_scale"):
        assert word in str(error.value)
