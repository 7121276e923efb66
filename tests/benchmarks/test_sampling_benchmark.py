"""What the benchmark of decoding compares does the same work, and it runs as it is documented."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import sampling as benchmark
from forks import run_forked
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import generate
from published_models import published_model

ROOT = Path(__file__).parents[2]


def test_the_published_way_has_the_published_greedy_codes():
    model, vectors = published_model("gpt_small")
    labels = torch.from_numpy(vectors["sample_labels"])
    for copy_keys in (True, False):
        codes = benchmark.PublishedWay(model, copy_keys).generate(labels, 2.0, temperature=0)
        np.testing.assert_array_equal(codes.numpy(), vectors["greedy_cfg2.0"])


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_both_ways_of_decoding_choose_the_same_codes_greedily(kv_heads):
    sizes = {"n_layers": 2, "n_heads": 4, "n_kv_heads": kv_heads, "dim": 64}
    model = benchmark.random_model(sizes, grid_size=6, vocab_size=300, device="cpu")
    for block in model.layers:  # stronger than at the start of training, so that codes depend on those before
        for parameter in block.parameters():
            parameter.data *= 5 if parameter.ndim == 2 else 1
    labels = torch.arange(8)
    published = benchmark.PublishedWay(model).generate(labels, 1.5, temperature=0)
    codes = generate(model, labels, labels, Options(cfg_scale=1.5, temperature=0))
    assert torch.equal(codes, published)
    assert len(codes.unique()) > 20 and len(codes.unique(dim=0)) == 8


def test_the_published_way_draws_by_chance():
    model = benchmark.random_model({"n_layers": 1, "n_heads": 2, "dim": 32}, grid_size=4, vocab_size=50, device="cpu")
    first, second = (benchmark.PublishedWay(model).generate(torch.arange(4), 2.0) for _ in range(2))
    assert first.shape == (4, 16) and not torch.equal(first, second)


@pytest.mark.processes
def test_sampling_benchmark_measures_every_way(tmp_path):
    small = ["--grid-size", "3", "--vocab-size", "64", "--batch", "2", "--repeats", "2", "--threads", "1"]
    done = run_forked("benchmarks.sampling", *small, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "sampling.json").read_text()) == result
    assert (result["codes"], result["batch"], result["repeats"], result["threads"]) == (9, 2, 2, 1)
    (model,) = result["models"]
    ways = [benchmark.PUBLISHED, benchmark.NO_COPY, benchmark.HERE]
    assert list(model["images_per_second"]) == ways and list(model["ratio"]) == ways[:2]
    assert result["ratios"] == {
        "small_to_published": pytest.approx(model["ratio"][benchmark.PUBLISHED]["median"], abs=1e-3),
        "small_to_published_no_copy": pytest.approx(model["ratio"][benchmark.NO_COPY]["median"], abs=1e-3),
    }
    table = (tmp_path / "sampling.md").read_text()
    for way, rate in model["images_per_second"].items():
        assert 0 < rate["lowest"] <= rate["median"] <= rate["highest"]
        assert f"| {way} | {rate['median']:.2f} |" in table
