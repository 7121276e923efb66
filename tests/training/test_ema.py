"""The moving average of the weights: that of one process, in every ZeRO stage, and of no influence on training."""

import pytest
import torch

from npp_ds.checkpoint.open import open_weights
from npp_ds.data.loader import EvalLoader
from npp_ds.data.store import stage as stage_shards
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer
from npp_ds.training.trainer import Trainer
from runs import NO_DROPOUT, metrics_of, outcome_of, plain_losses, run, tiny_config

pytestmark = pytest.mark.processes

DECAY = 0.8
KEYS = {
    "model": NO_DROPOUT,
    "schedule": {"patch_sides": [2, 1], "epochs": 2},
    "optimizer": {"learning_rate": 3e-3, "ema_decay": DECAY},
    "validation": {"every": 7, "weights": "both"},
}


@pytest.mark.parametrize(
    "zero_stage, precision",
    [
        (1, "fp32"),
        (2, "fp32"),
        (3, "fp32"),
        (2, "bf16"),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
        pytest.param(1, "autocast_bf16", marks=pytest.mark.slow),
        (3, "autocast_bf16"),
    ],
)
def test_ema_follows_the_recurrence_over_the_weights_of_every_step(pair, shards, tmp_path, zero_stage, precision):
    keys = {**KEYS, "deepspeed": {"config": f"zero{zero_stage}"}, "precision": precision, "validation": {"every": 0}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    parts = pair.run(_follow_by_hand, config)
    by_hand = {}
    for part in parts:
        for (name, start), values in part.items():
            by_hand.setdefault(name, {})[start] = values
    source = open_weights(tmp_path / "run", variant="ema")
    average, step = source.read(), source.step
    weights = open_weights(tmp_path / "run").read()
    assert step == 20
    for name, pieces in by_hand.items():
        expected = torch.cat([pieces[start] for start in sorted(pieces)])
        torch.testing.assert_close(average[name].flatten().double(), expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.allclose(average[n], weights[n], atol=1e-4) for n in weights), "it lags behind"


def _follow_by_hand(processes: Processes, config) -> dict:
    """Trains, and averages this rank's fp32 weights by hand in float64 after every step."""
    trainer = Trainer(config, processes)
    weights = trainer.engine.partitions
    averages = {(f.name, f.start): f.of(weights.masters).double() for f in weights.fragments}
    step = trainer.engine.step

    def followed(*arguments):
        result = step(*arguments)
        for f in weights.fragments:
            averages[f.name, f.start] = DECAY * averages[f.name, f.start] + (1 - DECAY) * f.of(weights.masters).double()
        return result

    trainer.engine.step = followed
    trainer.run()
    return averages


def test_ema_of_two_processes_is_that_of_plain_pytorch_in_one(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", **{**KEYS, "validation": {"every": 0}})
    pair.run(run, config)
    expected = {name: value.double() for name, value in plain_losses(config, 0)[2].items()}
    for steps in range(1, 21):
        for name, value in plain_losses(config, steps)[2].items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * value.double()
    average = open_weights(tmp_path / "run", variant="ema").read()
    for name, value in expected.items():
        # Adam enlarges the rounding of gradients near zero; without its last update the average is 1e-3 off.
        torch.testing.assert_close(average[name].double(), value, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "autocast_bf16"])
def test_validating_the_average_leaves_training_bit_identical(pair, shards, tmp_path, zero_stage, precision):
    keys = {**KEYS, "deepspeed": {"config": f"zero{zero_stage}"}, "precision": precision}
    pair.run(run, tiny_config(shards, tmp_path / "both", **keys))
    pair.run(run, tiny_config(shards, tmp_path / "raw", **{**keys, "validation": {"every": 7, "weights": "raw"}}))
    both, raw = outcome_of(tmp_path / "both"), outcome_of(tmp_path / "raw")
    assert [line for line in both.metrics if line["event"] != "validation_ema"] == raw.metrics
    assert all(torch.equal(both.state[name], raw.state[name]) for name in raw.state)
    found = {line["patch_side"]: line["nll"] for line in both.metrics if line["event"] == "validation_ema"}
    plain = {line["patch_side"]: line["nll"] for line in both.metrics if line["event"] == "validation"}
    assert found[1] != plain[1]
    config = tiny_config(shards, tmp_path / "both", **keys)
    model = Transformer(ModelConfig(**config.model.arguments())).eval()
    model.load_state_dict(open_weights(tmp_path / "both", variant="ema").read())
    store = stage_shards(config.data.val, config.data.cache_dir)
    ((codes, labels, _),) = EvalLoader(store, 1, len(store), 0, 1)
    with torch.no_grad():
        assert found[1] == pytest.approx(model(codes, labels).item(), rel=1e-5 if precision == "fp32" else 3e-3)


def test_a_checkpoint_without_an_average_says_so_when_it_is_asked_for_one(pair, shards, tmp_path):
    keys = {**KEYS, "optimizer": {"learning_rate": 3e-3}, "validation": {"every": 0}}
    pair.run(run, tiny_config(shards, tmp_path / "run", **keys))
    assert not any(line["event"] == "validation_ema" for line in metrics_of(tmp_path / "run"))
    with pytest.raises(UserError, match=r"holds no ema weights; set optimizer\.ema_decay"):
        open_weights(tmp_path / "run", variant="ema")
