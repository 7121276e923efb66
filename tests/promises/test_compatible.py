"""Runs of earlier versions resume. `data/run_format_2.tar.xz` holds one from before config keys were compared."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from npp_ds.checkpoint import folders
from npp_ds.checkpoint.folders import read_record, write_record
from npp_ds.config.load import load_config
from runs import error_of, metrics_of, run

pytestmark = pytest.mark.processes

STEP = 11


@pytest.fixture
def folder(tmp_path) -> Path:
    """run/, stopped after 11 of 16 steps (stage 2 of 2, two ranks, ZeRO-2, EMA); shards/; undisturbed_*.jsonl."""
    with tarfile.open(Path(__file__).parents[1] / "data/run_format_2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def config_in(folder: Path, *overrides: str):
    places = {"run_dir": "run", "data.train": "shards/train", "data.val": "shards/val", "data.cache_dir": "cache"}
    return load_config(
        file=folder / "run/config.yaml", overrides=[*(f"{k}={folder / v}" for k, v in places.items()), *overrides]
    )


def test_a_run_of_format_2_ends_like_its_undisturbed_twin(pair, folder):
    pair.run(run, config_in(folder))
    expected = [json.loads(line) for line in (folder / "undisturbed_metrics.jsonl").read_text().splitlines()]
    found = {(m["event"], m["step"], m.get("patch_side")): m for m in metrics_of(folder / "run")}
    later = [m for m in expected if m["step"] > STEP and m["event"] in ("train", "validation", "validation_ema")]
    assert len(later) == 5 + 2
    for line in later:
        ours = found[line["event"], line["step"], line["patch_side"]]
        for key in {"loss", "grad_norm", "learning_rate", "nll"} & line.keys():
            assert ours[key] == pytest.approx(line[key], rel=1e-6), (key, line)
    samples = (folder / "run/sample_log.jsonl").read_text()
    assert samples == (folder / "undisturbed_sample_log.jsonl").read_text()


def test_a_run_without_a_later_key_resumes_and_another_value_than_its_default_is_refused(pair, folder):
    newest = folders.folder_of(folder / "run/checkpoints", STEP)
    config, record = config_in(folder), read_record(newest)
    saved = config.fixed_keys()
    del saved["optimizer"]["eps"]
    write_record(newest, replace(record, config=saved, format=folders.FORMAT))
    (folder / "run/config.yaml").unlink()
    other = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"eps": 1e-6})})
    assert "optimizer.eps: found 1e-08, requested 1e-06" in pair.run(error_of, other)[0]
    assert pair.run(error_of, config)[0] == "no error"


def test_a_run_of_format_2_whose_config_is_gone_is_refused(pair, folder):
    config = config_in(folder)
    (folder / "run/config.yaml").unlink()
    assert "config.yaml: missing, and step-00000011 was saved without its settings" in pair.run(error_of, config)[0]
