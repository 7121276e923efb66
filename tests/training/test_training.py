"""DeepSpeed training equals plain PyTorch, tells what it does, and stops before harm is done."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from npp_ds.checkpoint import folders
from npp_ds.checkpoint.open import open_weights
from npp_ds.checkpoint.rank_files import write_state
from npp_ds.data.loader import EvalLoader
from npp_ds.data.order import batch_ids
from npp_ds.data.store import stage as stage_shards
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer
from npp_ds.sizes import SIZES
from npp_ds.training.deepspeed_config import import_deepspeed
from npp_ds.training.engine import TrainingEngine
from npp_ds.training.trainer import Trainer
from runs import NO_DROPOUT, error_of, metrics_of, plain_losses, run, tiny_config

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("world_size, zero_stage", [(2, 1), (2, 2), (2, 3), (1, 3)])
@pytest.mark.parametrize("micro_batch_size", [8, 2], ids=["in large pieces", "in small pieces"])
def test_losses_equal_plain_pytorch_across_two_stage_boundaries(
    pools, shards, tmp_path, world_size, zero_stage, micro_batch_size
):
    config = tiny_config(
        shards,
        tmp_path / "run",
        model=NO_DROPOUT,
        deepspeed={"config": f"zero{zero_stage}"},
        schedule={"micro_batch_size": micro_batch_size},
        optimizer={"gradient_clipping": 0.4},
        validation={"every": 0},
    )
    pools[world_size].run(run, config)
    lines = [line for line in metrics_of(tmp_path / "run") if line["event"] == "train"][:30]
    losses, norms, _ = plain_losses(config, 30)
    assert [line["patch_side"] for line in lines] == [4] * 10 + [2] * 10 + [1] * 10
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > config.optimizer.gradient_clipping > min(norms), "clipping acts on some steps, not on all"


def test_a_stage_scales_dropout_and_the_next_one_has_its_own(pools, shards, tmp_path):
    stages = [{"patch_side": 2, "steps": 3, "dropout_scale": 0}, {"patch_side": 1, "steps": 1}]
    keys = {"schedule": {"stages": stages, "warmup_epochs": 0}, "validation": {"every": 0}}
    rates = dict.fromkeys(NO_DROPOUT, 0.5)
    pools[1].run(run, tiny_config(shards, tmp_path / "run", model=rates, **keys))
    found = [line["loss"] for line in metrics_of(tmp_path / "run") if line["event"] == "train"]
    expected, _, _ = plain_losses(tiny_config(shards, tmp_path, model=NO_DROPOUT, **keys), 4)
    assert found[:3] == pytest.approx(expected[:3], rel=1e-5) and found[3] != pytest.approx(expected[3], rel=1e-5)


@pytest.mark.parametrize(  # bf16 first: autocast leaves a mark on DeepSpeed's module
    "world_size, zero_stage, precision",
    [
        (2, 2, "bf16"), (2, 3, "bf16"), (1, 3, "bf16"),
        (2, 1, "autocast_bf16"), (2, 2, "autocast_bf16"), (2, 3, "autocast_bf16"), (1, 3, "autocast_bf16"),
    ],
)  # fmt: skip
def test_bf16_training_follows_fp32_training(pools, shards, tmp_path, world_size, zero_stage, precision):
    keys = {"model": NO_DROPOUT, "deepspeed": {"config": f"zero{zero_stage}"}, "validation": {"every": 0}}
    pools[world_size].run(run, tiny_config(shards, tmp_path / "run", precision=precision, **keys))
    losses = [line["loss"] for line in metrics_of(tmp_path / "run") if line["event"] == "train"][:30]
    exact, _, _ = plain_losses(tiny_config(shards, tmp_path / "unused", **keys), 30)
    assert losses == pytest.approx(exact, rel=3e-3)
    assert losses != exact
    assert max(abs(loss - math.log(1000)) for loss in exact) > 3 * 3e-3 * math.log(1000), "the losses moved"


def test_metrics_tell_stages_steps_validation_and_end(undisturbed):
    metrics = undisturbed.metrics
    stages = [line for line in metrics if line["event"] == "stage"]
    assert [(s["step"], s["patch_side"], s["end_step"]) for s in stages] == [(0, 4, 10), (10, 2, 20), (20, 1, 40)]
    train = [line for line in metrics if line["event"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 41))
    validated = [(line["step"], line["patch_side"]) for line in metrics if line["event"] == "validation"]
    assert validated == [
        (7, 1), (7, 4), (10, 1), (10, 4), (14, 1), (14, 2), (20, 1), (20, 2), (21, 1), (28, 1), (35, 1), (40, 1),
    ]  # fmt: skip
    assert metrics[-1]["event"] == "end"
    assert train[0]["loss"] == pytest.approx(math.log(1000), abs=1e-3)
    assert train[-1]["loss"] < train[20]["loss"]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_validation_is_the_mean_over_all_held_out_images_at_both_sides(pair, shards, tmp_path, zero_stage):
    keys = {"deepspeed": {"config": f"zero{zero_stage}"}, "validation": {"every": 0, "batch_size": 7}}
    keys["schedule"] = {"patch_sides": [4], "epochs": 1, "end_at_patch_side_one": False}
    config = tiny_config(shards, tmp_path / "run", **keys)
    pair.run(run, config)
    model = Transformer(ModelConfig(**config.model.arguments())).eval()
    model.load_state_dict(open_weights(tmp_path / "run").read())
    store = stage_shards(config.data.val, config.data.cache_dir)
    found = {line["patch_side"]: line["nll"] for line in metrics_of(tmp_path / "run") if line["event"] == "validation"}
    assert set(found) == {1, 4}
    for side, nll in found.items():
        (codes, labels, count), *rest = EvalLoader(store, side, len(store), 0, 1)
        assert count == 50
        assert not rest
        with torch.no_grad():
            assert nll == pytest.approx(model(codes, labels).item(), rel=1e-5)


def _sample_log(processes: Processes, config) -> list[list[int]]:
    """Runs and returns the ids of this rank's rows, step by step."""
    seen = []

    class Watching(TrainingEngine):
        def step(self, step, micro_batches, learning_rate):
            seen.append(list(map(int, micro_batches[0][0].flatten().tolist())))
            return super().step(step, micro_batches, learning_rate)

    trainer = Trainer(config, processes)
    trainer.engine.__class__ = Watching
    trainer.run()
    return seen


def test_both_ranks_together_train_on_the_batches_of_the_order(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", schedule={"patch_sides": [1], "epochs": 1})
    seen = pair.run(_sample_log, config)
    store = stage_shards(config.data.train, config.data.cache_dir)
    for step in range(10):
        rows = store.codes[batch_ids(len(store), 16, config.seed, 0, step)]
        expected = [set(map(bytes, row)) for row in rows]
        found = [np.array(s[step], np.uint16).reshape(8, -1) for s in seen]
        for crops, codes in zip(expected, np.concatenate(found), strict=True):
            assert bytes(codes) in crops


def _start_with_a_head_that_is_not_zero(processes: Processes, config) -> str:
    trainer = Trainer(config, processes)
    torch.nn.init.normal_(trainer.engine.engine.module.output.weight)
    try:
        trainer.run()
    except UserError as error:
        return str(error)
    return "went on"


def test_a_fresh_run_whose_first_loss_is_not_ln_vocabulary_stops_and_says_so(pair, shards, tmp_path):
    told = pair.run(_start_with_a_head_that_is_not_zero, tiny_config(shards, tmp_path / "run"))
    assert all("not ln(vocab_size) = 6.90776" in text for text in told), told
    assert not folders.saved_steps(tmp_path / "run" / "checkpoints")


def test_config_and_data_that_disagree_are_refused_on_all_ranks(pair, shards, tmp_path):
    told = pair.run(error_of, tiny_config(shards, tmp_path / "run", model={"grid_size": 8, "vocab_size": 500}))
    assert told[0] == told[1]
    assert "model.grid_size: 8, but the shards of data.train" in told[0]
    assert "set model.vocab_size=1000 or name other shards" in told[0]
    assert not (tmp_path / "run").exists()


def test_an_engine_setting_that_cannot_work_is_reported_before_anything_is_written(pair, shards, tmp_path):
    told = pair.run(error_of, tiny_config(shards, tmp_path / "run", deepspeed={"config": "zero7"}))
    assert "deepspeed.config: zero7 is neither a file nor one of zero1, zero2, zero2_bf16_gradients, zero3" in told[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["XXL", "2B"])
def test_published_widths_build_step_save_and_load_under_zero_init(pair, tmp_path, shards, size):
    told = pair.run(_wide_model, tmp_path, size, timeout=300)
    loss, again = told[0]
    assert loss == pytest.approx(math.log(1024), abs=1e-3)
    assert again == told[1][1]


def _wide_model(processes: Processes, folder: Path, size: str) -> tuple[float, float]:
    wide = {**SIZES[size], "n_layers": 1, "vocab_size": 1024, "num_classes": 1000, "ffn_multiple_of": 256}
    config = tiny_config(folder, folder / "run", model={**wide, **NO_DROPOUT}, deepspeed={"config": "zero3"})
    stage = replace(config.build_schedule(160, 2).stages[0], batch_size=2, micro_batch_size=1)
    engine = TrainingEngine(config, stage, processes)
    assert all(p.numel() == 0 for p in engine.engine.module.parameters()), "parameters are partitioned"
    assert import_deepspeed().utils.get_z3_leaf_modules(engine.engine.module) == list(engine.engine.module.layers), (
        "gathered block by block"
    )
    g = torch.Generator().manual_seed(processes.rank)
    batch = [(torch.randint(1024, (1, 4, 4), generator=g), torch.randint(1000, (1,), generator=g))]
    first = engine.step(0, batch, 1e-3)
    path = folder / f"rank-{processes.rank}.safetensors"
    write_state(path, engine.partitions.fragments, engine.state())
    second = engine.step(1, batch, 1e-3)
    assert second.loss < first.loss
    torch.distributed.barrier()
    engine.read(folder, ["rank-0.safetensors", "rank-1.safetensors"], 1)
    engine.partitions.publish()
    again = engine.step(1, batch, 1e-3)
    assert (again.loss.item(), again.grad_norm) == (second.loss.item(), second.grad_norm)
    return first.loss.item(), second.grad_norm
