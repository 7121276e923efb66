"""Likelihood of held-out codes by position: agreement with the loss, on one and two processes, `npp likelihood`."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from npp_ds.checkpoint.open import TokenizerId, open_weights
from npp_ds.cli import app
from npp_ds.data.loader import EvalLoader
from npp_ds.data.store import stage
from npp_ds.errors import UserError
from npp_ds.evaluation import likelihood
from npp_ds.evaluation.likelihood import likelihood_by_position, likelihood_of, mean_nll
from npp_ds.model import ModelConfig, Transformer, patches
from npp_ds.reporting.plot import likelihood_picture
from npp_ds.reporting.report import report_runs
from runs import metrics_of, run, tiny_config
from shard_sets import write_set


def model_of(seed: int = 0) -> Transformer:
    """For the shards of `shard_sets`, with a head that prefers some codes."""
    torch.manual_seed(seed)
    model = Transformer(
        ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=1000, grid_size=4, num_classes=10, residual_dropout=0.5)
    )
    nn.init.normal_(model.output.weight, std=0.4)
    return model


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


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_set(folder / "val", 23, 1, seed=3)
    return stage(folder / "val", folder / "cache")


@pytest.mark.parametrize("patch_side", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 23])
def test_the_mean_over_positions_is_the_loss(store, patch_side, batch_size):
    model = model_of().train()
    found = likelihood_by_position(model, EvalLoader(store, patch_side, batch_size, 0, 1), "cpu")
    loss = mean_nll(model, EvalLoader(store, patch_side, 5, 0, 1), "cpu")
    assert model.training
    assert found.nll.shape == (4 // patch_side,) * 2 and found.nll.dtype == np.float64
    assert (found.images, found.patch_side, found.codes_per_image) == (23, patch_side, 16)
    assert found.nll.mean() == pytest.approx(loss, rel=1e-6)
    assert found.bits_per_image == pytest.approx(16 * loss / math.log(2), rel=1e-6)


@pytest.mark.parametrize("patch_side", [1, 2])
def test_every_position_agrees_with_a_float64_softmax(store, patch_side):
    model = model_of().eval()
    found = likelihood_by_position(model, EvalLoader(store, patch_side, 8, 0, 1), "cpu")
    ((codes, labels, _),) = EvalLoader(store, patch_side, 23, 0, 1)
    with torch.no_grad():
        logits = model(codes, labels, output="logits").double()
    nats = -logits.log_softmax(-1).gather(-1, codes)
    better = (logits[:, :, None] > logits.gather(-1, codes)[..., None]).sum(-1)
    grid = (4 // patch_side,) * 2
    np.testing.assert_allclose(found.nll, nats.mean((0, 2)).view(grid).numpy(), rtol=1e-6)
    for name, most in (("top1", 0), ("top5", 4)):
        expected = (better <= most).double().mean((0, 2)).view(grid).numpy()
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-12)
    assert found.nll.std() > 0.01


def test_a_model_that_knows_the_codes_of_one_row_is_certain_only_there(store):
    """Guesses are right where the logits say so, and a patch counts each of its codes."""

    class Oracle(nn.Module):
        def forward(self, codes, labels, output):
            logits = torch.zeros(*codes.shape[:2], 1000)
            logits[:, 4:8] = 30 * nn.functional.one_hot(codes[:, 4:8, 0], 1000)
            logits[:, 8:12] = logits[:, 4:8].roll(1, -1)  # the right code's neighbour
            return logits

    found = likelihood_by_position(Oracle(), EvalLoader(store, 1, 23, 0, 1), "cpu")
    assert (found.top1[1] == 1).all() and (found.top5[1] == 1).all() and (found.nll[1] < 1e-6).all()
    assert (found.top1[[0, 2, 3]] < 0.2).all()
    np.testing.assert_allclose(found.nll[0], math.log(1000), rtol=1e-6)


def figures_of_rank(processes, state_dict, shards, cache):
    model = model_of()
    model.load_state_dict(state_dict)
    loader = EvalLoader(stage(shards, cache), 2, 4, processes.rank, processes.world_size)
    found = likelihood_by_position(model, loader, "cpu")
    return found.images, found.nll, found.top1, found.top5


@pytest.mark.processes
def test_two_processes_find_what_one_finds(pair, tmp_path):
    write_set(tmp_path / "val", 17, 1, seed=5)
    store = stage(tmp_path / "val", tmp_path / "cache")
    expected = likelihood_by_position(model_of(), EvalLoader(store, 2, 4, 0, 1), "cpu")
    for images, *figures in pair.run(figures_of_rank, model_of().state_dict(), tmp_path / "val", tmp_path / "cache"):
        assert images == 17
        for found, one in zip(figures, (expected.nll, expected.top1, expected.top5), strict=True):
            np.testing.assert_allclose(found, one, rtol=1e-6)


def test_logits_are_bounded_whatever_the_size_of_the_set():
    assert likelihood.images_at_a_time(256, 16384) == 16
    assert likelihood.images_at_a_time(10**6, 65536) == 1


@pytest.fixture(scope="module")
def trained(pair, shards, tmp_path_factory):
    """The folder of a run whose last validation is that of its newest checkpoint."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    keys = {
        "schedule": {"patch_sides": [2], "epochs": 2, "end_at_patch_side_one": False},
        "optimizer": {"learning_rate": 3e-3, "ema_decay": 0.9},
        "validation": {"every": 0, "batch_size": 8, "weights": "both"},
    }
    pair.run(run, tiny_config(shards, folder, **keys))
    return folder


@pytest.mark.processes
def test_npp_likelihood_measures_what_validation_logged_and_the_report_shows_its_picture(trained, tmp_path):
    logged = {(e["event"], e["patch_side"]): e["nll"] for e in metrics_of(trained) if e["event"].startswith("valid")}
    for event, kind, side in (("validation", "raw", 1), ("validation", "raw", 2), ("validation_ema", "ema", 2)):
        options = ["--weights", kind, "--patch-side", str(side), "--out", str(tmp_path / f"{kind}-{side}.json")]
        done = CliRunner().invoke(app, ["likelihood", str(trained), *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        result = json.loads((tmp_path / f"{kind}-{side}.json").read_text())
        assert result["nats_per_code"] == pytest.approx(logged[event, side], rel=1e-5)
        assert result["bits_per_image"] == pytest.approx(16 * result["nats_per_code"] / math.log(2), rel=1e-9)
        assert np.mean(result["by_position"]["nats_per_code"]) == pytest.approx(result["nats_per_code"], rel=1e-9)
        assert np.shape(result["by_position"]["top5_accuracy"]) == (4 // side, 4 // side)
        assert result["tokenizer"] == {"name": "random", "sha256": "0" * 64} and "git_commit" in result
        facts = result["images"], result["precision"], result["weights"]["kind"], result["weights"]["step"]
        assert facts == (50, "fp32", kind, 20)
        assert f"{result['nats_per_code']:.4f} nats per code" in done.output
        assert min(Image.open(tmp_path / f"{kind}-{side}.png").size) > 300
    done = CliRunner().invoke(app, ["likelihood", str(trained), "--limit", "7"], catch_exceptions=False)
    assert json.loads((trained / "likelihood.json").read_text())["images"] == 7
    report_runs([trained])
    assert "Where the model is unsure" in (trained / "report.html").read_text()


@pytest.mark.processes
def test_of_several_processes_the_first_one_measures(trained, tmp_path, monkeypatch):
    for variable, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(variable, value)
    done = CliRunner().invoke(app, ["likelihood", str(trained), "--out", str(tmp_path / "a.json")])
    assert (done.exit_code, done.output, list(tmp_path.iterdir())) == (0, "", [])


@pytest.mark.processes
def test_an_unwritable_result_is_reported_before_measuring(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "likelihood_by_position", None)
    (tmp_path / "file").write_text("")
    for out, problem in ((tmp_path / "file/a.json", "file: File exists"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=problem):
            CliRunner().invoke(app, ["likelihood", str(trained), "--out", str(out)], catch_exceptions=False)


@pytest.mark.processes
def test_bf16_products_are_close_and_recorded(trained, shards):
    source = open_weights(trained)
    exact, fast = (
        likelihood_of(source, shards / "val", precision=p, cache_dir=shards / "cache") for p in ("fp32", "bf16")
    )
    assert fast["precision"] == "bf16"
    assert exact["nats_per_code"] != fast["nats_per_code"] == pytest.approx(exact["nats_per_code"], rel=1e-2)


@pytest.mark.processes
def test_what_does_not_fit_is_named(trained, tmp_path, shards):
    source = open_weights(trained)
    with pytest.raises(UserError, match="patch_side 3 does not divide"):
        likelihood_of(source, shards / "val", cache_dir=shards / "cache", patch_side=3)
    with pytest.raises(UserError, match="found 'fp8', expected one of fp32, bf16"):
        likelihood_of(source, shards / "val", cache_dir=shards / "cache", precision="fp8")
    other = replace(source, tokenizer=TokenizerId("vq_ds16_c2i.pt", "1" * 64))
    of_both = r"tokenizer random \(000000000000\.\.\), the model has vq_ds16_c2i\.pt \(111111111111"
    with pytest.raises(UserError, match=of_both):
        likelihood_of(other, shards / "val", cache_dir=shards / "cache")
    unknown = likelihood_of(replace(source, tokenizer=None), shards / "val", cache_dir=shards / "cache", limit=3)
    assert unknown["images"] == 3
    source.model.vocab_size = 999
    with pytest.raises(UserError, match=r"not codes for the model of .*vocab_size 1000, the model has 999"):
        likelihood_of(source, shards / "val", cache_dir=shards / "cache")


def test_the_picture_shows_where_the_model_is_unsure():
    maps = {"nats_per_code": np.ones((16, 16)), "top1_accuracy": np.ones((16, 16)), "top5_accuracy": np.ones((16, 16))}
    facts = {"images": 3, "patch_side": 1, "bits_per_image": 12.0}
    facts |= {"weights": {"name": "tiny", "step": None, "kind": "raw"}, **dict.fromkeys(maps, 0.5)}

    def middle_of_the_dark(unsure_row: int) -> float:
        """Mean picture row of the first map's dark cells, where the model is sure."""
        nats = np.ones((16, 16))
        nats[unsure_row] = 5
        result = {**facts, "by_position": {**{n: m.tolist() for n, m in maps.items()}, "nats_per_code": nats.tolist()}}
        picture = np.asarray(Image.open(io.BytesIO(likelihood_picture(result))).convert("L"))
        return float(np.flatnonzero((picture[:, : picture.shape[1] // 3] < 40).mean(1) > 0.4).mean())

    assert middle_of_the_dark(0) > middle_of_the_dark(15) + 10
