"""The plan's formulas of what a step sends agree with traces of DeepSpeed's collectives, and bf16 gradients train."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.network import collectives_of, early_share, nccl_bytes
from benchmarks.step_loops import EngineLoop, batches_of
from npp_ds.config.schema import RunConfig
from npp_ds.distributed.process_group import Processes
from npp_ds.planning.plan import sent_bytes
from npp_ds.training.deepspeed_config import read_settings

pytestmark = pytest.mark.processes
STEPS = 5


def config_of(settings: str, precision: str, accumulation: int) -> RunConfig:
    model = {"dim": 512, "n_layers": 1, "n_heads": 8, "vocab_size": 256, "grid_size": 4, "num_classes": 10}
    schedule = {
        "stages": [{"patch_side": 1, "epochs": 1}], "batch_size": 16, "micro_batch_size": 8 // accumulation,
        "warmup_epochs": 0,
    }  # fmt: skip
    return RunConfig.model_validate(
        {
            "precision": precision,
            "model": {**model, "token_dropout": 0, "residual_dropout": 0, "ffn_dropout": 0},
            "data": {"train": "unused"},
            "schedule": schedule,
            "deepspeed": {"config": settings},
        }
    )


def steps_of(processes: Processes, config: RunConfig) -> tuple[list[float], dict[tuple[str, str], int]]:
    """The losses of a few steps, and the elements of the collectives of the last by operation and dtype."""
    step = step_of(processes, config)[0]
    losses = [step() for _ in range(STEPS - 1)]
    return losses, dict(collectives_of(lambda: losses.append(step())))


def step_of(processes: Processes, config: RunConfig) -> tuple[Callable[[], float], nn.Module]:
    """A function that takes a step and returns its loss, and the model."""
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # DeepSpeed (0.19.8) never resets it; a run has one engine
    (stage,) = config.build_schedule(16, 2).stages
    loop, batches = EngineLoop(config, stage), batches_of(config, stage, torch.device("cpu"))
    batches = batches[processes.rank :: 2]
    return lambda: loop.step(stage, batches).item(), loop.engine.engine.module


def early_share_of(processes: Processes, config: RunConfig) -> float:
    return early_share(*step_of(processes, config))


@pytest.mark.parametrize(
    "settings, precision, accumulation",
    [
        ("zero1", "autocast_bf16", 2),
        ("zero2", "autocast_bf16", 2),
        ("zero2_bf16_gradients", "autocast_bf16", 1),
        ("zero2_bf16_gradients", "bf16", 2),
        ("zero3", "bf16", 1),
    ],
)
def test_a_step_sends_what_the_plan_says(pair, settings, precision, accumulation):
    config = config_of(settings, precision, accumulation)
    for _, counted in pair.run(steps_of, config):
        large = [(*key, count) for key, count in counted.items() if count > 1000]
        planned = sent_bytes(config, read_settings(settings), 2, accumulation)
        assert nccl_bytes(large) / 2 == pytest.approx(planned, rel=0.02)  # norms and small numbers apart


def test_gradients_in_bf16_change_losses_by_their_rounding_only(pair):
    (exact, wide), (rounded, narrow) = (
        pair.run(steps_of, config_of(settings, "fp32", 1))[0] for settings in ("zero2", "zero2_bf16_gradients")
    )
    assert wide["reduce_", "float32"] == narrow["reduce_", "bfloat16"] > 1e6
    assert rounded == pytest.approx(exact, rel=1e-3) and rounded[-1] < rounded[0]


@pytest.mark.parametrize("settings, bucket, lowest, highest", [
    ("zero2", 500_000, 0.8, 0.99), ("zero2", 50_000_000, 0, 0), ("zero1", 500_000, 0, 0)
])  # fmt: skip
def test_zero2_sends_full_buckets_during_the_backward_pass(pair, tmp_path, settings, bucket, lowest, highest):
    shipped = json.loads(Path(f"ds_configs/{settings}.json").read_text())
    shipped["zero_optimization"]["reduce_bucket_size"] = bucket
    (tmp_path / "ds.json").write_text(json.dumps(shipped))
    for share in pair.run(early_share_of, config_of(str(tmp_path / "ds.json"), "fp32", 1)):
        assert lowest <= share <= highest
