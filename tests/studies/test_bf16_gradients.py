"""The study of gradients sent in bf16 trains, pairs its runs by seed, and writes its table."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from studies import bf16_gradients

STAGES = "[{patch_side: 2, steps: 2}, {patch_side: 1, steps: 2}]"


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_with_gradients_in_bf16_is_trained_and_validated(shards, tmp_path):
    overrides = [f"data.train={shards}/train", f"data.val={shards}/val", f"schedule.stages={STAGES}"]
    overrides += [
        "model.vocab_size=1000",
        "model.grid_size=4",
        "schedule.batch_size=16",
        "schedule.warmup_epochs=0",
        "data.tokenizer=null",
    ]
    curve = bf16_gradients.train([*overrides, "deepspeed.config=zero2_bf16_gradients"], tmp_path / "run", 2)
    assert [(step, side) for step, side, _ in curve][-1] == (4, 1) and all(nats > 0 for *_, nats in curve)


def test_the_table_pairs_runs_by_seed(tmp_path, monkeypatch):
    losses = {"zero2": (3.0, 3.02, 3.07), "zero2_bf16_gradients": (3.01, 3.01, 3.07)}

    def train(overrides, run_dir, processes):
        keys = dict(word.split("=") for word in overrides)
        nats = losses[keys["deepspeed.config"]][int(keys["seed"])]
        return [(5, 2, nats + 1), (10, 1, nats)]

    monkeypatch.setattr(bf16_gradients, "train", train)
    monkeypatch.setattr(sys, "argv", ["", "--train", "T", "--val", "V", "--out", str(tmp_path / "result")])
    bf16_gradients.main()
    for run in json.loads((tmp_path / "result.json").read_text())["runs"].values():
        assert run["differences"] == pytest.approx([0.01, -0.01, 0]) and run["mean"] == pytest.approx(0, abs=1e-12)
        assert run["spread_of_seeds"] == pytest.approx(0.0361, abs=1e-4) and run["largest_difference"] == pytest.approx(
            0.01
        )
    assert "| longer | 10 | 1 | 3.0200 | 3.0100 | -0.0100 |" in (tmp_path / "result.md").read_text()
