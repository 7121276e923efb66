"""Guidance over positions: the schedules have the published values, and the sampled codes follow them."""

import numpy as np
import pytest
import torch

from npp_ds.errors import UserError
from npp_ds.sampling.logits_processing import Options, guide
from npp_ds.sampling.sampler import generate
from published_models import published_model


def guidance_scales(positions: int, *scale_schedule_power, **options) -> list[float]:
    names = ("cfg_scale", "cfg_schedule", "cfg_power")
    return Options(**dict(zip(names, scale_schedule_power, strict=False)), **options).guidance_scales(positions)


@pytest.fixture(scope="module")
def small():
    return published_model("gpt_small")[0]


def test_schedules_rise_from_no_guidance_as_published():
    assert guidance_scales(4, 3.0) == [3.0] * 4
    assert guidance_scales(4, 3.0, "linear") == [1.0, 1.5, 2.0, 2.5]
    np.testing.assert_allclose(guidance_scales(4, 3.0, "linear", 2.0), [1, 1.125, 1.5, 2.125])
    np.testing.assert_allclose(guidance_scales(4, 3.0, "cosine"), [1, 2 - 0.5**0.5, 2, 2 + 0.5**0.5])
    # RAR: (guidance_scale - 1) * (1 - cos(((step / image_seq_len) ** guidance_scale_pow) * pi)) / 2 + 1
    published = [(16.0 - 1) * (1 - np.cos((step / 256) ** 2.75 * np.pi)) / 2 + 1 for step in range(256)]
    np.testing.assert_allclose(guidance_scales(256, 16.0, "cosine", 2.75), published)


def test_the_interval_ends_guidance_where_the_published_sampler_does():
    # LlamaGen guides its prefill, then code i = 0, 1, .. after it unless i > cfg_interval.
    for interval in (0, 1, 2, 3):
        published = [2.0, *(1.0 if interval > -1 and i > interval else 2.0 for i in range(4))]
        assert guidance_scales(5, 2.0, cfg_interval=interval) == published
    assert guidance_scales(5, 2.0, cfg_interval=-1) == [2.0] * 5


def test_a_scale_of_one_gives_the_conditional_logits_to_the_bit():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guide(logits, torch.tensor(1.0)), logits[:3])
    torch.testing.assert_close(guide(logits, torch.tensor(2.0)), 2 * logits[:3] - logits[3:])
    assert torch.equal(guide(logits, torch.tensor(0.0)), logits[3:])


def test_codes_are_those_of_the_full_forward_guided_by_the_scale_of_each_position(small):
    labels = torch.tensor([3, 0, 7])
    for options in ({"cfg_schedule": "linear"}, {"cfg_schedule": "cosine", "cfg_power": 0.5}, {"cfg_interval": 20}):
        codes = generate(small, labels, torch.arange(3), Options(cfg_scale=4.0, temperature=0, **options))
        with torch.no_grad():
            conditional, unconditional = (
                small(codes[..., None], x, output="logits") for x in (labels, torch.full_like(labels, 10))
            )
        scales = torch.tensor(guidance_scales(codes.shape[1], 4.0, **options))[:, None]
        expected = (unconditional + (conditional - unconditional) * scales).argmax(-1)
        assert torch.equal(codes, expected)
        assert not torch.equal(codes, generate(small, labels, torch.arange(3), Options(cfg_scale=4.0, temperature=0)))


def test_codes_up_to_the_interval_are_guided_and_those_after_it_are_not(small):
    labels, indices = torch.arange(4), torch.arange(4)
    guided = generate(small, labels, indices, Options(seed=1, cfg_scale=5.0))
    early = generate(small, labels, indices, Options(seed=1, cfg_scale=5.0, cfg_interval=9))
    assert torch.equal(guided[:, :11], early[:, :11]) and not torch.equal(guided, early)
    plain = generate(small, labels, indices, Options(seed=1))
    assert torch.equal(plain, generate(small, labels, indices, Options(seed=1, cfg_scale=1.0, cfg_schedule="cosine")))


def test_all_bad_guidance_options_are_reported_together(small):
    bad = {"cfg_scale": float("inf"), "cfg_schedule": "sine", "cfg_power": 0.0, "cfg_interval": -2, "top_k": -1}
    with pytest.raises(UserError) as error:
        generate(small, torch.tensor([1]), torch.tensor([0]), Options(**bad))
    for word in bad:
        assert word in str(error.value)
    with pytest.raises(UserError, match="cfg_power: found 2, expected 1, because it has no effect"):
        generate(small, torch.tensor([1]), torch.tensor([0]), Options(cfg_power=2))
