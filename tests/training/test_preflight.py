"""What is compared before a run starts: the codes and classes of its shards, its initial weights and its tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from image_sets import save_tiny_tokenizer
from npp_ds.checkpoint.export import export_weights
from npp_ds.checkpoint.open import TokenizerId, open_weights
from npp_ds.cli import app
from npp_ds.config.schema import DataSection, RunConfig
from npp_ds.data.manifest import Manifest
from npp_ds.errors import UserError
from npp_ds.evaluation.likelihood import likelihood_of
from npp_ds.model import ModelConfig, Transformer
from npp_ds.training.preflight import fitting_schedule, staged_sets
from npp_ds.utils.files import sha256
from runs import logs, shards_in, tiny_config

NAMES = [f"n{i:02d}" for i in range(1, 11)]
SHIFTED = [f"n{i:02d}" for i in range(2, 12)]
SWAPPED = [*NAMES[:3], NAMES[4], NAMES[3], *NAMES[5:]]
OTHER = TokenizerId("other.pt", "1" * 64)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Shards whose classes are NAMES, of the tokenizer "random"."""
    shards_in(tmp_path)
    for key in ("train", "val"):
        describe(tmp_path / key, class_names=NAMES)
    return tmp_path


def describe(shards: Path, **changes) -> None:
    Manifest.load(shards).model_copy(update=changes).save(shards)


def weights_file(path: Path, tokenizer: TokenizerId | None, class_names: list[str]) -> Path:
    """An export whose model is that of `tiny_config`."""
    model = Transformer(ModelConfig(**tiny_config(path, path).model.arguments()))
    torch.save({"model": model.state_dict()}, path.with_suffix(".pt"))
    weights = open_weights(path.with_suffix(".pt"), n_heads=2, grid_size=4)
    export_weights(replace(weights, tokenizer=tokenizer, class_names=tuple(class_names)), path)
    return path


def problems(config: RunConfig) -> str:
    try:
        fitting_schedule(config, 1)
    except UserError as error:
        return str(error)
    return ""


def tokenizer_info(shards: Path, tokenizer: TokenizerId):
    return Manifest.load(shards).tokenizer.model_copy(update=tokenizer._asdict())


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"class_names": SHIFTED}, "its label 0 is 'n02', but 'n01' in data.train"),
        ({"class_names": SWAPPED}, "its label 3 is 'n05', but 'n04' in data.train"),
        ({"tokenizer": OTHER}, "its tokenizer is other.pt (111111111111..), but random (000000000000..) in data.train"),
        ({"class_names": []}, None),
    ],
)
def test_held_out_shards_of_other_classes_or_codes_are_refused_unless_accepted(folder, tmp_path, changes, found):
    if "tokenizer" in changes:
        changes = {"tokenizer": tokenizer_info(folder / "val", OTHER)}
    describe(folder / "val", **changes)
    told = problems(tiny_config(folder, tmp_path / "run"))
    if found is None:
        assert told == ""
        return
    assert f"data.val ({folder}/val): {found} ({folder}/train)" in told and "data.allow_mismatch=true" in told
    with logs() as said:
        assert problems(tiny_config(folder, tmp_path / "run", data={"allow_mismatch": True})) == ""
    assert any(found in text for text in said)


@pytest.mark.parametrize(
    "tokenizer, class_names, found",
    [
        (OTHER, NAMES, "its tokenizer is other.pt (111111111111..), but random (000000000000..) in data.train"),
        (None, SWAPPED, "its label 3 is 'n05', but 'n04' in data.train"),
        (TokenizerId("renamed", "0" * 64), NAMES, None),
        (None, [], None),
    ],
)
def test_initial_weights_of_other_classes_or_codes_are_refused_unless_accepted(
    folder, tmp_path, tokenizer, class_names, found
):
    path = str(weights_file(tmp_path / "start.safetensors", tokenizer, class_names))
    told = problems(tiny_config(folder, tmp_path / "run", init_from=path))
    if found is None:
        assert told == ""
        return
    assert f"init_from ({path}): {found}" in told and "data.allow_mismatch=true" in told
    assert problems(tiny_config(folder, tmp_path / "run", init_from=path, data={"allow_mismatch": True})) == ""


def test_likelihood_refuses_shards_of_other_classes_than_the_weights(folder, tmp_path):
    weights = open_weights(weights_file(tmp_path / "start.safetensors", None, SWAPPED))
    with pytest.raises(UserError, match=r"not codes for the model of .*: label 3 'n04', the model has 'n05'"):
        likelihood_of(weights, folder / "val", cache_dir=folder / "cache")
    config = tiny_config(folder, tmp_path / "run", data={"allow_mismatch": True})
    with logs() as said:
        likelihood_of(replace(weights, config=config), config.data.val, cache_dir=folder / "cache", limit=1)
    assert any("label 3 is 'n04', the model was trained with 'n05'" in text for text in said)


@pytest.mark.parametrize("name, found", [("nowhere.pt", "no such file"), ("fashion_mnist", "made by random")])
def test_a_tokenizer_that_could_not_decode_samples_is_refused_by_training_and_doctor(folder, tmp_path, name, found):
    config = tiny_config(folder, tmp_path / "run", data={"tokenizer": name})
    assert "data.tokenizer: tokenizer " in (told := problems(config)) and found in told
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os._exit", lambda code: None)
        done = CliRunner().invoke(app, ["doctor", "--config", str(tmp_path / "config.yaml")])
    assert "data.tokenizer: tokenizer" in done.output


def test_a_tokenizer_is_known_by_its_file_whatever_its_name(folder, tmp_path):
    file = save_tiny_tokenizer(tmp_path / "vq.safetensors")
    for key in ("train", "val"):
        made_by = tokenizer_info(folder / key, TokenizerId("elsewhere.pt", sha256(file)))
        describe(folder / key, tokenizer=made_by)
    assert problems(tiny_config(folder, tmp_path / "run", data={"tokenizer": str(file)})) == ""


@pytest.mark.parametrize("monitor", ["wandb", "tensorboard"])
def test_a_monitor_whose_package_is_missing_is_refused(folder, tmp_path, monkeypatch, monitor):
    config = tiny_config(folder, tmp_path / "run", logging={"monitors": ["csv", monitor]})

    def missing(name: str) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr("npp_ds.training.deepspeed_config.import_module", missing)
    assert f"logging.monitors: {monitor} cannot be imported (no such package)" in problems(config)
    monkeypatch.setattr("npp_ds.training.deepspeed_config.import_module", lambda name: None)
    assert problems(config) == ""


def test_processes_that_read_different_sets_are_told_apart(folder):
    class TwoNodes:
        on_all = staticmethod(lambda action, *arguments: action(*arguments))
        gather = staticmethod(lambda value: value and [value, ("0123456789ab", "node2")])

    with pytest.raises(UserError, match=r"data\.train: rank 1 on node2 reads another set \(0123456789ab\) than rank 0"):
        staged_sets(DataSection(train=str(folder / "train"), cache_dir=str(folder)), TwoNodes())
