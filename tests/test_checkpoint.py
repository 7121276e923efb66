"""An interrupted run ends like an undisturbed one, and a checkpoint is complete or recognised as torn."""

import json
from pathlib import Path

import pytest
import torch

from npp_ds.errors import UserError
from npp_ds.training import checkpoint
from runs import NO_DROPOUT, error_of, metrics_of, plain_losses, run, run_and_stop_after, shards_in, tiny_config
from workers import WorkerError, WorkerPool

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_weights_read_from_a_checkpoint_are_those_of_plain_pytorch(pair, shards, tmp_path, zero_stage):
    config = tiny_config(shards, tmp_path / "run", model=NO_DROPOUT, deepspeed={"config": f"zero{zero_stage}"})
    pair.run(run_and_stop_after, config, 13)
    weights, step = checkpoint.load_weights(tmp_path / "run")
    _, _, expected = plain_losses(config, 13)
    assert step == 13
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 27])
def test_an_interrupted_run_equals_an_undisturbed_one_bit_for_bit(pair, shards, tmp_path, undisturbed, steps):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, steps)
    pair.run(run, config)
    metrics, weights = undisturbed
    assert metrics_of(tmp_path / "run") == metrics
    resumed, _ = checkpoint.load_weights(tmp_path / "run")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "zero_stage, precision, micro_batch_size",
    [
        (1, "autocast_bf16", 4),
        (1, "fp32", 8),
        (2, "bf16", 8),
        (3, "bf16", 4),
        (2, "autocast_bf16", 2),
        (3, "fp32", 4),
        (3, "autocast_bf16", 8),
    ],
)
def test_resume_is_exact_in_every_zero_stage_precision_and_accumulation(
    pair, shards, tmp_path, zero_stage, precision, micro_batch_size
):
    keys = {
        "deepspeed": {"config": f"zero{zero_stage}"},
        "precision": precision,
        "schedule": {"micro_batch_size": micro_batch_size, "patch_sides": [2, 1], "epochs": 3},
        "validation": {"every": 0},
    }
    undisturbed = tiny_config(shards, tmp_path / "undisturbed", **keys)
    pair.run(run, undisturbed)
    config = tiny_config(shards, tmp_path / "run", **keys)
    pair.run(run_and_stop_after, config, 13)
    pair.run(run, config)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "undisturbed")
    found, expected = (checkpoint.load_weights(tmp_path / name)[0] for name in ("run", "undisturbed"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_finished_run_started_again_changes_nothing(pair, shards, tmp_path, undisturbed):
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
    assert metrics_of(tmp_path / "run") == before, "killed between its last checkpoint and its last line"


def test_a_run_folder_with_other_settings_is_refused_and_the_difference_shown(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    other = tiny_config(shards, tmp_path / "run", optimizer={"learning_rate": 1e-3})
    told = pair.run(error_of, other)
    assert "optimizer.learning_rate: 0.003 there, 0.001 now" in told[0]


def test_torn_checkpoints_are_named_and_passed_over_and_never_a_silent_fresh_start(pair, shards, tmp_path, undisturbed):
    folder = tmp_path / "run"
    config = tiny_config(shards, folder)
    pair.run(run_and_stop_after, config, 3)
    pair.run(run_and_stop_after, config, 6)
    checkpoints = folder / "checkpoints"
    assert checkpoint.saved_steps(checkpoints) == [6, 3]
    victim = next((checkpoints / "step-00000006").glob("zero_pp_rank_1*optim_states.pt"))
    whole = victim.read_bytes()
    said: list[str] = []
    for damage, words in (
        (whole[:-1], "bytes, expected"),
        (whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:], "its SHA-256 is not the recorded one"),
        (None, "missing"),
    ):
        victim.unlink() if damage is None else victim.write_bytes(damage)
        said.clear()
        assert checkpoint.newest_complete(checkpoints, said.append) == checkpoints / "step-00000003"
        assert "step-00000006 is torn" in said[0]
        assert words in said[0]
        with pytest.raises(UserError, match="asked for, but torn"):
            checkpoint.asked_for(checkpoints, 6)
    pair.run(run, config)
    assert metrics_of(folder) == undisturbed[0]


def test_other_shards_or_settings_under_a_checkpoint_are_refused(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    others = shards_in(tmp_path / "others", seed=7)
    moved = tiny_config(shards, tmp_path / "run", data={"train": str(others / "train")})
    assert "trained on other shards than those in data.train" in pair.run(error_of, moved)[0]
    (tmp_path / "run" / "config.yaml").unlink()
    other = tiny_config(shards, tmp_path / "run", seed=5)
    assert "saved by a run with other settings" in pair.run(error_of, other)[0]


def test_the_same_shards_in_another_place_go_on(pair, shards, tmp_path, undisturbed):
    pair.run(run_and_stop_after, tiny_config(shards, tmp_path / "run"), 3)
    elsewhere = shards_in(tmp_path / "elsewhere")
    pair.run(run, tiny_config(elsewhere, tmp_path / "run"))
    assert metrics_of(tmp_path / "run") == undisturbed[0]


def test_a_checkpoint_of_another_format_is_an_error_and_not_passed_over(tmp_path):
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    (folder / "COMPLETE.json").write_text(json.dumps({"format": 99, "news": 1}))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        checkpoint.newest_complete(tmp_path)


def test_retention_counts_only_what_this_run_has_reached(tmp_path):
    for step in (3, 4, 6):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "COMPLETE.json").write_text("{}")
    checkpoint.remove_old(tmp_path, step=4, keep_last=1, keep_steps=set())
    assert checkpoint.saved_steps(tmp_path) == [6, 4]


def test_checkpoints_that_are_all_torn_are_an_error(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    (tmp_path / "run" / "checkpoints" / "step-00000003" / "COMPLETE.json").unlink()
    assert "none of its checkpoints (3) is complete" in pair.run(error_of, config)[0]
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load_weights(tmp_path / "run")


def test_another_number_of_processes_or_zero_stage_is_refused_with_what_was_saved(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    told = pair.run(error_of, tiny_config(shards, tmp_path / "run", deepspeed={"config": "zero3"}))
    assert "saved by 2 processes with ZeRO-2 in fp32, this start has 2 processes with ZeRO-3" in told[0]
    alone = WorkerPool(1)
    told = alone.run(error_of, config)
    alone.stop()
    assert "saved by 2 processes with ZeRO-2 in fp32, this start has 1 processes with ZeRO-2" in told[0]
    assert metrics_of(tmp_path / "run")[-1]["step"] == 3, "a refused start changes nothing"


def test_only_the_asked_number_of_checkpoints_and_the_ends_of_stages_are_kept(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", checkpoint={"every": 3, "keep_last": 2}, validation={"every": 0})
    pair.run(run, config)
    assert checkpoint.saved_steps(tmp_path / "run" / "checkpoints") == [40, 39, 20, 10]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000040"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


def test_a_checkpoint_that_holds_code_is_not_run(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run")
    pair.run(run_and_stop_after, config, 3)
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    marker = tmp_path / "executed"
    victim = folder / "mp_rank_00_model_states.pt"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"module": Payload()}, victim)
    record = json.loads((folder / "COMPLETE.json").read_text())
    record["files"][victim.name] = checkpoint._flush_and_hash(victim)
    (folder / "COMPLETE.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load_weights(tmp_path / "run")
    with pytest.raises(WorkerError, match=r"[Ww]eights.only"):
        pair.run(run, config)
    assert not marker.exists()
