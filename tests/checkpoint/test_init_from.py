"""A run that starts from given weights has exactly these, a fresh optimizer, and its own schedule."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from npp_ds.checkpoint.export import export_weights
from npp_ds.checkpoint.open import open_weights
from npp_ds.distributed.process_group import Processes
from npp_ds.model import ModelConfig, Transformer
from npp_ds.training.trainer import Trainer
from runs import assert_same, error_of, metrics_of, outcome_of, run, run_and_stop_after, tiny_config
from shard_sets import write_set

pytestmark = pytest.mark.processes

NEXT = {"schedule": {"patch_sides": [1], "epochs": 1, "warmup_epochs": 0}, "validation": {"every": 0, "batch_size": 8}}


@pytest.fixture(scope="module")
def source(pair, shards, tmp_path_factory) -> Path:
    """A finished run with an average."""
    folder = tmp_path_factory.mktemp("source") / "run"
    keys = {"schedule": {"patch_sides": [2, 1], "epochs": 2}, "optimizer": {"learning_rate": 3e-3, "ema_decay": 0.9}}
    pair.run(run, tiny_config(shards, folder, deepspeed={"config": "zero2"}, **keys))
    return folder


def test_an_export_records_its_run_step_and_tokenizer(source, tmp_path):
    export_weights(open_weights(source, step=10, variant="ema"), tmp_path / "a.safetensors")
    found, opened = open_weights(tmp_path / "a.safetensors"), open_weights(source, step=10, variant="ema")
    assert (found.name, found.step, found.variant, found.model) == ("tiny", 10, "ema", opened.config.model)
    assert found.tokenizer == opened.tokenizer == ("random", "0" * 64)
    assert found.config_hash == opened.config.hash()
    expected = opened.read()
    assert all(torch.equal(values, expected[name]) for name, values in found.read().items())


def test_another_set_of_shards_under_the_same_path_is_not_taken_for_the_training_data(source, tmp_path, shards):
    shutil.copytree(source, tmp_path / "run")
    write_set(tmp_path / "train", 32, seed=9)
    config = tiny_config(shards, tmp_path / "run", data={"train": str(tmp_path / "train")})
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    assert open_weights(source).tokenizer is not None
    assert open_weights(tmp_path / "run").tokenizer is None


def _fragments_at_the_start(processes: Processes, config) -> list[tuple[str, str, int, torch.Tensor]]:
    """(kind, parameter, start, values) of everything that this rank holds before its first step."""
    trainer = Trainer(config, processes)
    engine, found, first_step = trainer.engine, [], trainer.engine.step

    def watched(*arguments):
        if not found:
            for kind, partitions in engine.state().items():
                found.extend((kind, f.name, f.start, f.of(partitions).clone()) for f in engine.partitions.fragments)
            found.append(("optimizer_steps", "", 0, torch.tensor(engine.partitions.optimizer_steps)))
        return first_step(*arguments)

    engine.step = watched
    trainer.run()
    return found


@pytest.mark.parametrize(
    "zero_stage, precision",
    [(1, "fp32"), (3, "autocast_bf16"), (2, "bf16"), pytest.param(3, "bf16", marks=pytest.mark.slow)],
)
def test_masters_equal_the_file_bit_for_bit_and_the_optimizer_is_fresh(
    pair, shards, source, tmp_path, zero_stage, precision
):
    export_weights(open_weights(source), tmp_path / "start.safetensors")
    keys = {**NEXT, "optimizer": {"learning_rate": 1e-3, "ema_decay": 0.5}, "precision": precision}
    keys |= {"init_from": str(tmp_path / "start.safetensors"), "deepspeed": {"config": f"zero{zero_stage}"}}
    ranks = pair.run(_fragments_at_the_start, tiny_config(shards, tmp_path / "run", **keys))
    expected = open_weights(source).read()
    seen = {kind: {name: torch.zeros(t.numel()) for name, t in expected.items()} for kind in ("master", "ema")}
    for kind, name, start, values in (fragment for rank in ranks for fragment in rank):
        if kind in seen:
            assert torch.equal(values, expected[name].flatten()[start : start + len(values)]), (kind, name)
            seen[kind][name][start : start + len(values)] += 1
        else:
            assert not values.any(), (kind, name)
    assert all(count.eq(1).all() for counts in seen.values() for count in counts.values())


@pytest.mark.parametrize("how", ["run folder", "safetensors", "published", "published ema"])
def test_a_run_starts_from_any_source_with_another_schedule(pair, shards, source, tmp_path, how):
    origin, nll = source, _last_nll(source)
    if how == "safetensors":
        export_weights(open_weights(source), origin := tmp_path / "start.safetensors")
    elif how.startswith("published"):
        variant = "ema" if how == "published ema" else "raw"
        export_weights(open_weights(source, variant=variant), origin := tmp_path / "start.pt", layout="published")
    config = tiny_config(shards, tmp_path / "run", init_from=str(origin), **NEXT)
    pair.run(run, config)
    metrics = metrics_of(tmp_path / "run")
    (init,) = [line for line in metrics if line["event"] == "init"]
    assert (init["path"], init["step"], len(init["sha256"])) == (str(origin), 0, 64)
    first = next(line for line in metrics if line["event"] == "validation")
    assert (first["step"], first["patch_side"]) == (0, 1)
    if how == "published ema":
        assert first["nll"] != pytest.approx(nll, rel=1e-6)
    else:
        assert first["nll"] == pytest.approx(nll, rel=1e-6)
        assert abs(first["nll"] - math.log(1000)) > 1e-3, "these are trained weights"
    losses = [line["loss"] for line in metrics if line["event"] == "train"]
    assert len(losses) == 10 and losses[0] != pytest.approx(math.log(1000), abs=1e-3)
    assert metrics[-1] == {"event": "end", "step": 10}


def _last_nll(run_dir: Path) -> float:
    return [m["nll"] for m in metrics_of(run_dir) if m["event"] == "validation" and m["patch_side"] == 1][-1]


def test_a_resume_needs_no_file_and_ends_like_an_uninterrupted_run(pair, shards, source, tmp_path):
    keys = {**NEXT, "init_from": str(tmp_path / "start.safetensors")}
    export_weights(open_weights(source), tmp_path / "start.safetensors")
    pair.run(run, tiny_config(shards, tmp_path / "undisturbed", **keys))
    config = tiny_config(shards, tmp_path / "run", **keys)
    pair.run(run_and_stop_after, config, 4)
    (tmp_path / "start.safetensors").unlink()
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), outcome_of(tmp_path / "undisturbed"))
    fresh = tiny_config(shards, tmp_path / "fresh", **keys)
    assert "init_from: " in (told := pair.run(error_of, fresh)[0]) and "start.safetensors: not found" in told
    other = tiny_config(shards, tmp_path / "run", **{**keys, "init_from": str(source)})
    assert f"init_from: found '{tmp_path}/start.safetensors', requested '{source}'" in pair.run(error_of, other)[0]


def test_a_second_start_without_a_checkpoint_logs_its_own_weights_only(pair, shards, source, tmp_path):
    keys = {**NEXT, "init_from": str(tmp_path / "start.safetensors")}
    export_weights(open_weights(source), tmp_path / "start.safetensors")
    config = tiny_config(shards, tmp_path / "run", **keys)
    pair.run(run_and_stop_after, config, 4)
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        (folder / "COMPLETE.json").unlink()
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(line for line in lines if '"checkpoint"' not in line))
    export_weights(open_weights(source, variant="ema"), tmp_path / "start.safetensors", force=True)
    pair.run(run, config)
    lines = metrics_of(tmp_path / "run")
    (init,) = [line for line in lines if line["event"] == "init"]
    assert (init["kind"], init["source_step"]) == ("ema", 20)
    assert len([line for line in lines if line["event"] == "validation" and line["step"] == 0]) == 1


def test_weights_of_another_shape_are_refused_before_anything_starts(pair, shards, tmp_path):
    other = ModelConfig(dim=64, n_layers=3, n_heads=2, vocab_size=1000, grid_size=4, num_classes=7, ffn_multiple_of=16)
    torch.save({"model": Transformer(other).state_dict()}, tmp_path / "other.pt")
    told = pair.run(error_of, tiny_config(shards, tmp_path / "run", init_from=str(tmp_path / "other.pt")))[0]
    for key, ours, theirs in (("dim", 32, 64), ("n_layers", 2, 3), ("num_classes", 10, 7)):
        assert f"model.{key}: {ours}, but the weights of init_from ({tmp_path}/other.pt) have {theirs}" in told
    assert "vocab_size" not in told
    assert not (tmp_path / "run").exists()
