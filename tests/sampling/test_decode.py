"""Decoding: greedy codes equal the published sampler's, cached equal full logits, sampled codes follow the softmax."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch

from npp_ds.errors import UserError
from npp_ds.model import patches
from npp_ds.model.transformer import Block
from npp_ds.sampling.logits_processing import Options, choose, gumbel, keep_likely, noise_keys
from npp_ds.sampling.sampler import captured_batch, generate
from published_models import published_model


@pytest.fixture(scope="module")
def small():
    return published_model("gpt_small")


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_greedy_codes_equal_the_published_sampler(small, cfg_scale):
    model, vectors = small
    labels = torch.from_numpy(vectors["sample_labels"])
    codes = generate(model, labels, torch.arange(4), Options(cfg_scale=cfg_scale, temperature=0))
    np.testing.assert_array_equal(codes.numpy(), vectors[f"greedy_cfg{cfg_scale}"])


@pytest.mark.parametrize("name", ["gpt_small", "gpt_gqa"])
@pytest.mark.parametrize("patch_side", [1, 2, 4])
def test_cached_logits_equal_the_full_forward(name, patch_side):
    model, vectors = published_model(name)
    codes = patches.group(torch.from_numpy(vectors["codes"].astype(np.int64)), patch_side)[:, :40]
    labels = torch.from_numpy(vectors["labels"])
    grid = model.config.grid_size // patch_side
    cache = model.new_cache(len(codes), grid, torch.float32, "cpu")
    inputs = [labels, *codes[:, :-1].unbind(1)]
    with torch.no_grad():
        logits = torch.stack([model.decode_step(x, i, cache) for i, x in enumerate(inputs)], dim=1).numpy()
    np.testing.assert_allclose(logits, vectors[f"logits_p{patch_side}"][:, :40], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch_side", [1, 2, 4])
def test_greedy_codes_of_grouped_query_attention_equal_the_full_forward_argmax(patch_side):
    model, _ = published_model("gpt_gqa")
    labels = torch.tensor([3, 0])
    codes = patches.group(
        generate(model, labels, torch.arange(2), Options(temperature=0, patch_side=patch_side)), patch_side
    )
    assert (codes == codes[..., :1]).all()
    with torch.no_grad():
        expected = model(codes, labels, output="logits").argmax(-1)
    assert torch.equal(codes[..., 0], expected)
    assert len(codes[..., 0].unique()) > 3


@pytest.mark.parametrize("name", ["gpt_small", "gpt_gqa"])
@pytest.mark.parametrize("patch_side", [1, 2])
def test_steps_that_read_the_cache_in_buckets_give_the_logits_of_the_full_forward(name, patch_side):
    model, vectors = published_model(name)
    codes = patches.group(torch.from_numpy(vectors["codes"].astype(np.int64)), patch_side)[:, :40]
    labels = torch.from_numpy(vectors["labels"])
    cache = model.new_cache(len(codes), model.config.grid_size // patch_side, torch.float32, "cpu")
    with torch.no_grad():
        logits = [model.decode_step(labels, 0, cache)]
        for i, x in enumerate(codes[:, :-1].unbind(1), start=1):
            logits.append(
                model.decode_step(x, torch.tensor([i]), cache, length=min(i // 12 * 12 + 12, len(cache.rotary)))
            )
    expected = vectors[f"logits_p{patch_side}"][:, :40]
    np.testing.assert_allclose(torch.stack(logits, dim=1).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_only_the_filled_part_of_the_cache_is_read(small):
    model, vectors = small
    codes, labels = (torch.from_numpy(vectors[key].astype(np.int64)) for key in ("codes", "labels"))
    cache = model.new_cache(len(codes), model.config.grid_size, torch.float32, "cpu")
    unfilled = 0
    for position in range(12):
        length = None if position < 6 else 12
        for tensor in (*cache.keys, *cache.values):
            tensor[:, :, length or position :] = torch.nan
            unfilled += tensor.isnan().sum().item()
        inputs = codes[:, position - 1, None] if position else labels
        with torch.no_grad():
            logits = model.decode_step(inputs, torch.tensor([position]) if length else position, cache, length)
        np.testing.assert_allclose(logits.numpy(), vectors["logits_p1"][:, position], rtol=1e-4, atol=1e-4)
        for tensor in (*cache.keys, *cache.values):
            tensor.nan_to_num_(0.0)
    assert unfilled > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cfg_scale": 2.5, "temperature": 0.9, "top_k": 50, "top_p": 0.9},
        {"cfg_scale": 3.0, "cfg_schedule": "linear"},
        {"cfg_scale": 3.0, "cfg_interval": 20},
        {"cfg_scale": 2.0, "patch_side": 2},
    ],
)
def test_steps_in_the_captured_form_sample_the_codes_of_plain_steps(small, options):
    model, _ = small
    labels, indices = torch.arange(5), torch.arange(20, 25)
    codes = generate(model, labels, indices, Options(seed=3, **options), capture=True)
    assert torch.equal(codes, generate(model, labels, indices, Options(seed=3, **options)))
    again = generate(model, labels.flip(0), indices.flip(0), Options(seed=3, **options), capture=True)
    assert torch.equal(again, codes.flip(0))  # the same batch, after other images were in it
    fewer = generate(model, labels[3:], indices[3:], Options(seed=3, **options), capture=True)
    assert torch.equal(fewer, codes[3:])


def test_a_batch_is_captured_once_and_again_after_weights_have_moved():
    model, _ = published_model("gpt_small")

    def captured(size, guided=True, **options):
        return captured_batch(model, size, guided, Options(**options), torch.device("cpu"))

    batch = captured(4)
    assert batch.size == 4 and captured(4) is batch
    assert captured(3).size == 3, "another size has other last bits, whatever was captured before"
    batch = captured(3)
    model.norm.weight = torch.nn.Parameter(model.norm.weight.detach().clone())
    assert captured(3) is not batch
    batch = captured(3)
    assert captured(3, guided=False) is not batch
    batch = captured(3)
    assert captured(3, seed=7, cfg_scale=3.0) is batch and captured(3, top_k=3) is not batch


def test_a_captured_batch_lives_as_long_as_its_model():
    model, _ = published_model("gpt_small")
    batch = captured_batch(model, 2, True, Options(), torch.device("cpu"))
    batch.step(model, 0, True)
    batch.step(model, 1, True)
    batch = weakref.ref(batch)
    del model
    gc.collect()
    assert batch() is None


def test_few_compilations_serve_all_layers_batch_sizes_and_lengths():
    model, _ = published_model("gpt_gqa")
    compiled = []
    forms = [
        torch.compile(half, fullgraph=True, backend=lambda graph, _: compiled.append(graph) or graph.forward)
        for half in (Block.project, Block.attend)
    ]
    for rows, position, length in ((4, 3, 24), (4, 40, 48), (6, 17, 30), (9, 2, 20), (5, 55, 60)):
        caches = [model.new_cache(rows, model.config.grid_size, torch.float32, "cpu") for _ in range(2)]
        codes = torch.arange(rows)[:, None]
        with torch.no_grad():
            steps = [
                model.decode_step(codes, torch.tensor([position]), cache, length, *halves)
                for cache, halves in zip(caches, ((), forms), strict=True)
            ]
        torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(*keys) for keys in zip(*(cache.keys for cache in caches), strict=True))
    assert len(compiled) <= 2 + 3  # project: two batch sizes; attend: two lengths, and another batch size


def test_guidance_that_has_ended_costs_nothing(small, monkeypatch):
    model, _ = small
    rows = []
    decode_step = model.decode_step
    monkeypatch.setattr(model, "decode_step", lambda inputs, *a: rows.append(len(inputs)) or decode_step(inputs, *a))
    generate(model, torch.arange(3), torch.arange(3), Options(cfg_scale=2.0, cfg_interval=5))
    assert rows == [6] * 7 + [3] * (len(rows) - 7)
    rows.clear()
    generate(model, torch.arange(3), torch.arange(3), Options(cfg_scale=2.0, cfg_schedule="linear"))
    assert set(rows) == {6}


def test_weights_that_hooks_gather_and_release_around_each_module_are_enough(small):
    model, vectors = small
    model = copy.deepcopy(model)
    labels = torch.from_numpy(vectors["sample_labels"])
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            whole = parameter.data
            parameter.data = torch.empty(0)
            module.register_forward_pre_hook(lambda *_, p=parameter, w=whole: setattr(p, "data", w))
            module.register_forward_hook(lambda *_, p=parameter: setattr(p, "data", torch.empty(0)))
    codes = generate(model, labels, torch.arange(4), Options(cfg_scale=2.0, temperature=0))
    np.testing.assert_array_equal(codes.numpy(), vectors["greedy_cfg2.0"])
    assert all(parameter.numel() == 0 for parameter in model.parameters())


def test_a_bf16_model_is_sampled_with_float32_logits(small):
    model, vectors = small
    model = copy.deepcopy(model).bfloat16()
    labels = torch.from_numpy(vectors["sample_labels"])
    with torch.no_grad():
        logits = model.decode_step(labels, 0, model.new_cache(4, model.config.grid_size, torch.bfloat16, "cpu"))
    assert logits.dtype == torch.float32
    for capture in (False, True):
        codes = generate(model, labels, torch.arange(4), Options(cfg_scale=2.0, temperature=0), capture=capture)
        same = (codes.numpy() == vectors["greedy_cfg2.0"])[:, :4].mean()
        assert same > 0.6, same


def test_image_depends_only_on_seed_and_index(small):
    model, _ = small
    labels, indices = torch.arange(12) % 10, torch.arange(100, 112)
    options = {"seed": 5, "cfg_scale": 1.7, "top_p": 0.95}
    whole = generate(model, labels, indices, Options(**options))
    for chosen in ([7], [3, 11, 0], list(range(11, -1, -1))):
        assert torch.equal(generate(model, labels[chosen], indices[chosen], Options(**options)), whole[chosen])
    assert len(whole.unique(dim=0)) == 12
    assert not torch.equal(generate(model, labels, indices, Options(**{**options, "seed": 6})), whole)
    same_label = generate(model, torch.zeros(12, dtype=torch.int64), indices, Options(**options))
    assert len(same_label.unique(dim=0)) == 12


def test_sampled_codes_follow_the_softmax():
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
    model = copy.deepcopy(model).cuda()
    for capture in (False, True, True):
        codes = generate(model, labels, indices, Options(cfg_scale=2.0, temperature=0), capture=capture)
        np.testing.assert_array_equal(codes.cpu().numpy(), vectors["greedy_cfg2.0"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt_small", "gpt_gqa"])
@pytest.mark.parametrize("patch_side", [1, 2])
def test_captured_steps_on_cuda_sample_the_codes_of_plain_ones_batch_after_batch(name, patch_side):
    model = published_model(name)[0].cuda()
    options = {"seed": 4, "cfg_scale": 2.0, "top_k": 100, "top_p": 0.95, "cfg_interval": 20, "patch_side": patch_side}
    for start, count in ((0, 6), (50, 6), (7, 3)):
        indices = torch.arange(start, start + count).cuda()
        plain, captured = (generate(model, indices % 10, indices, Options(**options), capture=c) for c in (False, True))
        assert (plain == captured).all(dim=1).float().mean() > 0.5
        assert (plain == captured).float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_logits_on_cuda_are_near_the_plain_ones(dtype):
    model, vectors = published_model("gpt_gqa")
    model = model.cuda().to(dtype)
    codes = torch.from_numpy(vectors["codes"].astype(np.int64)).cuda()
    caches = [model.new_cache(len(codes), model.config.grid_size, dtype, "cuda") for _ in range(2)]
    labels = torch.from_numpy(vectors["labels"]).cuda()
    compiled = [torch.compile(half) for half in (Block.project, Block.attend)]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        for position in range(30):
            inputs = codes[:, position - 1, None] if position else labels
            plain = model.decode_step(inputs, position, caches[0])
            at = torch.tensor([position], device="cuda")
            near = model.decode_step(inputs, at, caches[1], 32, *compiled)
            torch.testing.assert_close(near, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())


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
    codes = generate(model, labels, torch.arange(4), Options(seed=9, top_k=1))
    np.testing.assert_array_equal(codes.numpy(), vectors["greedy_cfg1.0"])


def test_all_bad_options_are_reported_together(small):
    model, _ = small
    bad = Options(temperature=-1, top_k=-2, top_p=0, patch_side=3, cfg_scale=-1)
    with pytest.raises(UserError) as error:
        generate(
            model,
            torch.tensor([11]),
            torch.tensor([0]),
            bad,
        )
    for word in ("labels", "temperature", "top_k", "top_p", "patch_side", "cfg_scale"):
        assert word in str(error.value)
