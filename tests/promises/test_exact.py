"""An interrupted run equals an undisturbed one, step for step and bit for bit."""

import functools
import json

import pytest
import torch

from npp_ds.checkpoint.open import open_weights
from runs import (
    NO_DROPOUT,
    WATCHED,
    assert_same,
    error_of,
    metrics_of,
    outcome_of,
    plain_losses,
    run,
    run_and_stop_after,
    shards_in,
    tiny_config,
)

pytestmark = pytest.mark.processes

STAGE_ENDS, EPOCH_END = (10, 20), 30


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("steps", [_slow(1), 9, 10, 11, _slow(19), 20, _slow(21), _slow(29), 30, 31])
def test_exact_samples_rates_losses_averages_and_validation_after_an_interruption(
    pair, shards, tmp_path, undisturbed, steps
):
    config = tiny_config(shards, tmp_path / "run", **WATCHED)
    pair.run(run_and_stop_after, config, steps)
    assert len(metrics_of(tmp_path / "run")) < len(undisturbed.metrics)
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def test_exact_after_two_interruptions_with_asynchronous_checkpoints(pair, shards, tmp_path, undisturbed):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"asynchronous": True}, **WATCHED)
    pair.run(run_and_stop_after, config, 6)
    pair.run(run_and_stop_after, config, 17)
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def test_undisturbed_stages_meet_at_the_steps_that_are_interrupted(undisturbed):
    begun = {line["step"] for line in undisturbed.metrics if line["event"] == "stage"}
    assert begun == {0, *STAGE_ENDS}
    epochs = {line["step"]: line["epoch"] for line in undisturbed.metrics if line["event"] == "train"}
    assert epochs[EPOCH_END] + 1 == epochs[EPOCH_END + 1]


@pytest.mark.parametrize(
    "zero_stage, precision, micro_batch_size",
    [
        (1, "autocast_bf16", 4),
        _slow(1, "fp32", 8),
        (2, "bf16", 8),
        _slow(3, "bf16", 4),
        _slow(2, "autocast_bf16", 2),
        _slow(3, "fp32", 4),
        (3, "autocast_bf16", 8),
    ],
)
def test_exact_in_every_zero_stage_precision_and_accumulation(
    pair, shards, tmp_path, zero_stage, precision, micro_batch_size
):
    keys = {
        **WATCHED,
        "deepspeed": {"config": f"zero{zero_stage}"},
        "precision": precision,
        "schedule": {"micro_batch_size": micro_batch_size, "patch_sides": [2, 1], "epochs": 3},
    }
    undisturbed = tiny_config(shards, tmp_path / "undisturbed", **keys)
    pair.run(run, undisturbed)
    config = tiny_config(shards, tmp_path / "run", **keys)
    pair.run(run_and_stop_after, config, 13)
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), outcome_of(tmp_path / "undisturbed"))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_weights_read_from_a_checkpoint_are_those_of_plain_pytorch(pair, shards, tmp_path, zero_stage):
    config = tiny_config(shards, tmp_path / "run", model=NO_DROPOUT, deepspeed={"config": f"zero{zero_stage}"})
    pair.run(run_and_stop_after, config, 13)
    source = open_weights(tmp_path / "run")
    weights, step = source.read(), source.step
    _, _, expected = plain_losses(config, 13)
    assert step == 13
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_a_finished_run_started_again_changes_nothing(pair, shards, tmp_path):
    config = tiny_config(
        shards, tmp_path / "run", schedule={"patch_sides": [2, 1], "epochs": 2}, validation={"every": 0}
    )
    pair.run(run, config)
    before = metrics_of(tmp_path / "run")
    pair.run(run, config)
    assert metrics_of(tmp_path / "run") == before
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    pair.run(run, config)
    assert metrics_of(tmp_path / "run") == before, "killed between its last validation and its last line"
    lines = path.read_text().splitlines(keepends=True)
    last = [line for line in lines if json.loads(line)["event"] not in ("end", "validation")]
    path.write_text("".join(last))
    pair.run(run, config)
    found = metrics_of(tmp_path / "run")
    assert found[-2:] == before[-2:], "killed between its last checkpoint and its last validation"


def test_results_of_a_validation_are_told_once(pair, shards, tmp_path):
    keys = {**WATCHED, "validation": {"every": 7, "weights": "raw"}}
    pair.run(run_and_stop_after, tiny_config(shards, tmp_path / "run", **keys), 14)
    path = tmp_path / "run" / "metrics.jsonl"
    pair.run(run, tiny_config(shards, tmp_path / "run", **WATCHED))
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"end"' not in line))
    found = [
        (m["event"], m["step"], m["patch_side"]) for m in metrics_of(tmp_path / "run") if "validation" in m["event"]
    ]
    assert len(found) == len(set(found))


def test_the_same_shards_in_another_place_go_on(pair, shards, tmp_path, undisturbed):
    pair.run(run_and_stop_after, tiny_config(shards, tmp_path / "run", **WATCHED), 3)
    elsewhere = shards_in(tmp_path / "elsewhere")
    pair.run(run, tiny_config(elsewhere, tmp_path / "run", **WATCHED))
    assert_same(outcome_of(tmp_path / "run"), undisturbed)


def test_other_shards_or_settings_under_a_checkpoint_are_refused(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    others = shards_in(tmp_path / "others", seed=7)
    moved = tiny_config(shards, tmp_path / "run", data={"train": str(others / "train")})
    assert "trained on other shards than those in data.train" in pair.run(error_of, moved)[0]
    (tmp_path / "run" / "config.yaml").unlink()
    other = tiny_config(shards, tmp_path / "run", seed=5)
    assert "saved by a run with other settings (seed: found 0, requested 5)" in pair.run(error_of, other)[0]


def test_a_run_folder_with_other_settings_is_refused_and_the_difference_shown(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    other = tiny_config(shards, tmp_path / "run", optimizer={"learning_rate": 1e-3})
    told = pair.run(error_of, other)
    assert "optimizer.learning_rate: found 0.003, requested 0.001" in told[0]
