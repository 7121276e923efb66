"""TensorBoard and Weights & Biases get config, stages, curves and pictures; a fake wandb notes what it gets."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from npp_ds.distributed.process_group import Processes
from npp_ds.training.hooks import Hook
from npp_ds.training.trainer import Trainer
from runs import error_of, logs, metrics_of, tiny_config

FAKE = """
import json
from pathlib import Path

def note(**what):
    with open(Path(__file__).with_name("noted.jsonl"), "a") as file:
        file.write(json.dumps(what) + "\\n")

class Image:
    def __init__(self, data):
        self.shape = data.shape

class config:
    def update(values, allow_val_change=False):
        note(config=values)

def init(project=None, group=None, entity=None):
    note(project=project)

def log(data, step=None, commit=None):
    note(step=step, **{k: v.shape if isinstance(v, Image) else v for k, v in data.items()})
"""


class Pictures(Hook):
    """Sends a picture after six steps, as evaluations do, and a curve."""

    def __init__(self, log):
        self.log = log

    def is_due(self, stage, done):
        return done == 6

    def run(self, context):
        self.log.picture("samples", 6, Image.new("RGB", (16, 8), (255, 0, 0)))
        self.log.curves(6, {"evaluation/seconds": 1.5, "evaluation/unknown": None})


def _run(processes: Processes, config, modules: Path) -> list[str]:
    sys.path.insert(0, str(modules))
    try:
        with logs() as said:
            trainer = Trainer(config, processes)
            trainer.hooks.append(Pictures(trainer.log))
            trainer.run()
        return said
    finally:
        sys.path.remove(str(modules))
        sys.modules.pop("wandb", None)


def _config(shards: Path, run_dir: Path, *monitors: str):
    keys = {"schedule": {"patch_sides": [2, 1], "epochs": 2, "warmup_epochs": 0}, "validation": {"every": 0}}
    return tiny_config(shards, run_dir, logging={"every": 5, "monitors": list(monitors)}, **keys)


def test_monitors_get_config_stages_curves_and_pictures(pair, shards, tmp_path):
    (tmp_path / "wandb.py").write_text(FAKE)
    config = _config(shards, tmp_path / "run", "tensorboard", "wandb", "csv")
    said, _ = pair.run(_run, config, tmp_path)
    assert not [line for line in said if line.startswith("WARNING")]
    losses = {e["step"]: pytest.approx(e["loss"]) for e in metrics_of(tmp_path / "run") if e["event"] == "train"}
    assert list(losses) == [1, 5, 10, 15, 20]

    events = EventAccumulator(str(tmp_path / "run/monitor/tiny"), {"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    (shown,) = texts["config/text_summary"]
    assert "patch_sides" in shown.tensor_proto.string_val[0].decode()
    assert [t.step for t in texts["stage/text_summary"]] == [0, 10]
    assert b"patch_side 1" in texts["stage/text_summary"][1].tensor_proto.string_val[0]
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (6, 16, 8)
    scalars = {tag: {p.step: p.value for p in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert scalars["train/loss"] == losses and scalars["evaluation/seconds"] == {6: 1.5}
    assert scalars["stage/patch_side"] == {0: 2, 10: 1} and scalars["stage/end_step"] == {0: 10, 10: 20}
    assert scalars["train/stage"] == {1: 0, 5: 0, 10: 0, 15: 1, 20: 1}
    assert "evaluation/unknown" not in scalars

    noted = [json.loads(line) for line in (tmp_path / "noted.jsonl").read_text().splitlines()]
    assert noted[0] == {"project": "tiny"} and noted[1] == {"config": config.model_dump(mode="json")}
    assert {n["step"]: n["train/loss"] for n in noted if "train/loss" in n} == losses
    assert {n["step"]: n["stage/patch_side"] for n in noted if "stage/patch_side" in n} == {0: 2, 10: 1}
    assert [n for n in noted if "samples" in n] == [{"step": 6, "samples": [8, 16, 3]}]
    assert list((tmp_path / "run/monitor/tiny").glob("*stage_patch_side.csv"))


def test_a_monitor_that_raises_is_given_up_and_the_run_goes_on(pair, shards, tmp_path):
    (tmp_path / "wandb.py").write_text(FAKE.replace("self.shape = data.shape", "raise RuntimeError('quota')"))
    said, _ = pair.run(_run, _config(shards, tmp_path / "run", "wandb"), tmp_path)
    assert [line for line in said if line.startswith("WARNING")] == [
        "WARNING: logging.monitors: given up after RuntimeError('quota')"
    ]
    assert metrics_of(tmp_path / "run")[-1]["event"] == "end"


def test_a_missing_wandb_is_one_line_before_anything_is_written(pair, shards, tmp_path):
    (tmp_path / "wandb.py").write_text("import a_package_that_is_missing")
    for problem in pair.run(_error_with, _config(shards, tmp_path / "run", "wandb"), tmp_path):
        _, line = problem.splitlines()
        assert line == (
            "  - logging.monitors: wandb cannot be imported (No module named 'a_package_that_is_missing'); install it "
            "with `pip install wandb`, or drop it"
        )
    assert not (tmp_path / "run").exists()


def _error_with(processes: Processes, config, modules: Path) -> str:
    sys.path.insert(0, str(modules))
    try:
        return error_of(processes, config)
    finally:
        sys.path.remove(str(modules))
