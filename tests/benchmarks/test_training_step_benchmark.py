"""What the benchmark of the training step compares computes the same numbers, and it runs as it is documented."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import published_step, training_step
from npp_ds.config.schema import ModelSection
from npp_ds.model import patches
from published_models import published_model

NO_DROPOUT = dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), 0.0)


@pytest.mark.parametrize("name", ["gpt_small", "gpt_gqa"])
@pytest.mark.parametrize("patch_side", [1, 2, 4, 8])
def test_both_ways_have_the_same_loss_and_gradients(name, patch_side):
    model, vectors = published_model(name)
    codes, labels = torch.from_numpy(vectors["codes"].astype("int64")), torch.from_numpy(vectors["labels"])
    parameters = dict(model.named_parameters())
    loss = model(patches.group(codes, patch_side), labels)
    ours = torch.autograd.grad(loss, list(parameters.values()))
    loss_published = published_step.loss(model, codes, labels, patch_side)
    published = torch.autograd.grad(loss_published, list(parameters.values()))
    assert loss_published.item() == pytest.approx(float(vectors[f"loss_p{patch_side}"]), rel=1e-5)
    assert loss.item() == pytest.approx(loss_published.item(), rel=1e-5)
    for parameter, mine, theirs in zip(parameters, ours, published, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), parameter


def test_both_ways_train_alike_and_both_drop_out():
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 50, "grid_size": 8}
    codes, labels = torch.randint(50, (4, 64)), torch.randint(1000, (4,))
    weights = {}
    for dropout in (NO_DROPOUT, {}):
        for way in (training_step.HERE, training_step.PUBLISHED):
            step = training_step.Step(ModelSection(**sizes, **dropout), way, "cpu")
            for side in (4, 2, 1):
                step(codes, labels, side)
            assert all(parameter.grad is None for parameter in step.model.parameters())
            weights[way, bool(dropout)] = torch.cat([p.detach().flatten() for p in step.model.parameters()])
    ours, published = (weights[way, True] for way in (training_step.HERE, training_step.PUBLISHED))
    torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-5)
    for way in (training_step.HERE, training_step.PUBLISHED):
        assert not torch.equal(weights[way, True], weights[way, False])


def test_a_profile_counts_every_operation_in_one_group():
    sizes = ModelSection(dim=32, n_layers=1, n_heads=2, vocab_size=50, grid_size=8)
    step = training_step.Step(sizes, training_step.HERE, "cpu")
    codes, labels = torch.randint(50, (4, 64)), torch.randint(1000, (4,))
    groups = training_step.breakdown(lambda: step(codes, labels, 2), lambda: None, on_gpu=False)
    assert list(groups) == [
        *(name for name, _ in training_step.GROUPS), training_step.REST, training_step.BETWEEN,
    ]  # fmt: skip
    assert all(milliseconds > 0 for name, milliseconds in groups.items() if name != training_step.BETWEEN)


def results(run_benchmark, out: Path, name: str, *arguments: str) -> tuple[dict, str]:
    """(what a small run of the benchmark printed and wrote, its table)."""
    small = {"batch": 2, "layers": 1, "vocab-size": 64, "repeats": 2, "threads": 1, "turn-seconds": 0.02}
    words = [f"--{name}={value}" for name, value in small.items()]
    result = run_benchmark("training_step", *words, *arguments, "--out", str(out))
    assert json.loads((out / f"{name}.json").read_text()) == result
    assert [row["patch_side"] for row in result["sides"]] == [1, 2, 4, 8]
    return result, (out / f"{name}.md").read_text()


@pytest.mark.processes
def test_training_step_benchmark_measures_every_side(run_benchmark, tmp_path):
    result, table = results(run_benchmark, tmp_path, "training_step")
    names = [f"published_over_ours_side_{side}" for side in (1, 2, 4, 8)]
    assert list(result["wanted"]) == names
    assert list(result["ratios"]) == names + [f"side_1_over_side_{side}" for side in (2, 4, 8)]
    for row in result["sides"]:
        here, ratio = row["seconds"][training_step.HERE], row["over_ours"][training_step.PUBLISHED]
        keeping = row["over_ours"][training_step.PUBLISHED_KEEPING]["median"]
        assert 0 < here["lowest"] <= here["median"] <= here["highest"]
        line = next(
            line
            for line in table.splitlines()
            if line.startswith(f"| {row['patch_side']} | {1e3 * here['median']:.1f} (")
        )
        assert (
            f"| {ratio['median']:.2f} ({ratio['lowest']:.2f} .. {ratio['highest']:.2f}) | {row['wanted']:g} |" in line
        )
        assert f"| {keeping:.2f} (" in line


@pytest.mark.processes
def test_training_step_benchmark_profiles_every_side(run_benchmark, tmp_path):
    result, table = results(run_benchmark, tmp_path, "training_step_profile", "--profile")
    for group, milliseconds in result["sides"][0]["milliseconds"].items():
        assert f"| {group} | {milliseconds:.2f} |" in table
    assert f"| {sum(result['sides'][0]['milliseconds'].values()):.2f} |" in table
