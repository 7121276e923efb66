"""A run goes on with another number of processes or in another ZeRO stage, with the same batches and the same state."""

import json

import pytest
import torch

from npp_ds.checkpoint.open import open_weights
from npp_ds.distributed.process_group import Processes
from npp_ds.training.deepspeed_config import shipped_configs
from npp_ds.training.trainer import Trainer
from runs import (
    NO_DROPOUT,
    error_of,
    metrics_of,
    outcome_of,
    plain_losses,
    run,
    run_and_stop_after,
    state_of,
    tiny_config,
)

pytestmark = pytest.mark.processes

KEYS = {
    "model": NO_DROPOUT,
    "optimizer": {"learning_rate": 3e-3, "ema_decay": 0.9, "weight_decay": 0.3},
    "logging": {"every": 1, "samples": True},
    "validation": {"every": 0},
}


@pytest.fixture(scope="module")
def expected(pools, shards, tmp_path_factory):
    """A run of two processes in ZeRO-2 that nothing interrupts."""
    folder = tmp_path_factory.mktemp("elastic") / "run"
    pools[2].run(run, tiny_config(shards, folder, **KEYS))
    return outcome_of(folder)


def _fragments_after_loading(processes: Processes, config) -> tuple[dict, int, list[float]]:
    """What this rank holds right after a resume: {kind/name: (start, values)}, Adam's steps, weight decay by group."""
    trainer = Trainer(config, processes)
    folder, record = trainer.resumed_from
    trainer._load(folder, record)
    engine = trainer.engine
    held = {
        f"{kind}/{f.name}": (f.start, f.of(partitions).clone())
        for kind, partitions in engine.state().items()
        for f in engine.partitions.fragments
    }
    trainer._resources.close()
    decays = [group["weight_decay"] for group in engine.engine.optimizer.param_groups]
    return held, engine.partitions.optimizer_steps, decays


def _assert_holds(ranks: list[tuple[dict, int, list[float]]], state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        if "/" not in name:
            continue
        seen = torch.zeros(tensor.numel(), dtype=torch.int64)
        for held, _, _ in ranks:
            if name in held:
                start, values = held[name]
                assert torch.equal(values, tensor.flatten()[start : start + len(values)]), name
                seen[start : start + len(values)] += 1
        assert seen.eq(1).all(), f"{name}: every element is on exactly one rank"
    assert {steps for _, steps, _ in ranks} == {int(state["optimizer_steps"])}
    assert {tuple(decays) for _, _, decays in ranks} == {(0.3, 0.0)}, "groups keep their own weight decay"


@pytest.mark.parametrize(
    "path",
    [
        ((2, 2), (1, 2), (2, 2)),
        pytest.param(((2, 2), (4, 2), (2, 2)), marks=pytest.mark.slow),
        ((2, 1), (4, 1), (1, 1)),
        ((2, 3), (1, 3), (4, 3)),
        ((4, 2), (2, 3), (1, 2)),
        pytest.param(((2, 3), (2, 2), (2, 1)), marks=pytest.mark.slow),
        pytest.param(((1, 1), (4, 3), (2, 2)), marks=pytest.mark.slow),
    ],
    ids=lambda path: "-".join(f"{world}xZeRO{zero}" for world, zero in path),
)
def test_elastic_state_is_equal_per_parameter_and_training_goes_on_alike(pools, shards, tmp_path, expected, path):
    stops = [7, 18]
    for (world_size, zero_stage), stop in zip(path, [*stops, None], strict=True):
        config = tiny_config(shards, tmp_path / "run", deepspeed={"config": f"zero{zero_stage}"}, **KEYS)
        if stop != stops[0]:
            held = pools[world_size].run(_fragments_after_loading, config)
            _assert_holds(held, state_of(tmp_path / "run"))
        if stop:
            pools[world_size].run(run_and_stop_after, config, stop)
        else:
            pools[world_size].run(run, config)
    found = outcome_of(tmp_path / "run")
    assert found.samples == expected.samples, "the same images in the same order"
    losses, wanted = (
        [line["loss"] for line in m if line["event"] == "train"] for m in (found.metrics, expected.metrics)
    )
    assert len(losses) == 40
    assert losses == pytest.approx(wanted, rel=1e-5)
    for name, tensor in expected.state.items():
        if name.startswith(("master/", "ema/")):
            assert (found.state[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def test_elastic_in_bf16_keeps_the_masters_exactly(pools, shards, tmp_path):
    keys = {**KEYS, "precision": "bf16"}
    config = tiny_config(shards, tmp_path / "run", deepspeed={"config": "zero2"}, **keys)
    pools[2].run(run_and_stop_after, config, 13)
    saved = state_of(tmp_path / "run")
    assert any(not torch.equal(t, t.bfloat16().float()) for n, t in saved.items() if n.startswith("master/"))
    for world_size, zero_stage in ((4, 3), (1, 2), (2, 3)):
        config = tiny_config(shards, tmp_path / "run", deepspeed={"config": f"zero{zero_stage}"}, **keys)
        _assert_holds(pools[world_size].run(_fragments_after_loading, config), saved)


def test_elastic_micro_batches_shrink_by_themselves(pools, shards, tmp_path, expected):
    keys = {**KEYS, "schedule": {"micro_batch_size": 8}}
    pools[2].run(run_and_stop_after, tiny_config(shards, tmp_path / "run", **keys), 5)
    pools[4].run(run_and_stop_after, tiny_config(shards, tmp_path / "run", **keys), 15)
    pools[1].run(run, tiny_config(shards, tmp_path / "run", **keys))
    assert outcome_of(tmp_path / "run").samples == expected.samples


def test_elastic_does_not_mean_that_a_batch_is_changed_silently(pools, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", **KEYS)
    pools[2].run(run_and_stop_after, config, 5)
    told = pools[3].run(error_of, config)
    assert "schedule.batch_size: 16 (every stage) is not a multiple of 3 processes; use 15" in told[0]
    assert metrics_of(tmp_path / "run")[-1]["step"] == 5, "a refused start changes nothing"


@pytest.mark.parametrize(
    "zero_stage, settings",
    [
        (2, {"round_robin_gradients": True}),
        pytest.param(1, {"round_robin_gradients": True}, marks=pytest.mark.slow),
        pytest.param(2, {"offload_optimizer": {"device": "cpu"}}, marks=pytest.mark.slow),
        (3, {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 5000}),
        pytest.param(3, {"stage3_param_persistence_threshold": 0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_elastic_holds_for_other_settings_of_deepspeed(pools, shards, tmp_path, zero_stage, settings):
    keys = {**KEYS, "optimizer": {"learning_rate": 3e-3}}
    path = tmp_path / "ds.json"
    shipped = json.loads(shipped_configs()[f"zero{zero_stage}"].read_text())
    shipped["zero_optimization"].update(settings)
    path.write_text(json.dumps({**shipped, "zero_force_ds_cpu_optimizer": False}))
    config = tiny_config(shards, tmp_path / "run", **{**keys, "deepspeed": {"config": str(path)}})
    pools[2].run(run_and_stop_after, config, 13)
    _, _, expected = plain_losses(config, 13)
    weights = open_weights(tmp_path / "run").read()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)
    pools[1].run(run, config)
    losses = [line["loss"] for line in metrics_of(tmp_path / "run") if line["event"] == "train"]
    assert losses == pytest.approx(plain_losses(config, 40)[0], rel=1e-5)
