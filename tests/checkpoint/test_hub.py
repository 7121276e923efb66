"""Folders for Hugging Face: saved by models and by `npp export --format hub`, loaded offline, never pickled."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from image_sets import TINY, save_tiny_tokenizer
from npp_ds.checkpoint.open import open_weights
from npp_ds.cli import app
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer
from npp_ds.reporting.summary import read_run, read_run_of
from npp_ds.sampling.folder import load_samples, write_samples
from npp_ds.tokenizer.loading import check_tokenizer, load_tokenizer
from npp_ds.tokenizer.vq import VQModel
from sample_sets import MODEL, tiny_model, tiny_run


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))


def npp(*line: str | Path) -> str:
    done = CliRunner().invoke(app, list(map(str, line)))
    if done.exception:
        raise done.exception
    return done.output


def same(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    pairs = zip(found.state_dict().items(), expected.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_transformer_is_saved_and_loaded_bit_for_bit_and_read_by_the_commands(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved")
    loaded = Transformer.from_pretrained(tmp_path / "saved")
    assert same(loaded, model) and loaded.config == model.config and not loaded.training
    weights = open_weights(tmp_path / "saved")
    with pytest.raises(UserError, match="a file holds a single step"):
        open_weights(tmp_path / "saved", step=3)
    assert weights.name == "saved" and all(torch.equal(t, model.state_dict()[n]) for n, t in weights.read().items())
    monkeypatch.chdir(tmp_path / "saved")
    assert open_weights(".").name == "saved"
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_folder_without_all_tensors_or_with_pickles_only_is_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    other = {**MODEL, "n_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(RuntimeError, match=r"layers\.2"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors in it"):
        Transformer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="pickled weights are not read"):
        Transformer._load_as_pickle(model, "pytorch_model.bin", "cpu", True)


def test_a_saved_tokenizer_is_that_of_its_file(tmp_path):
    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path / "vq.safetensors"))
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert same(loaded, tokenizer) and loaded.config == TINY
    assert (loaded.name, loaded.sha256) == (tokenizer.name, tokenizer.sha256)
    check_tokenizer(tokenizer, tmp_path / "saved")
    assert same(VQModel.from_pretrained(tmp_path / "saved"), tokenizer)
    tokenizer.requires_grad_(True).save_pretrained(tmp_path / "trained")
    assert load_tokenizer(tmp_path / "trained").sha256 != tokenizer.sha256, "another one, once it could be trained"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_exported_folder_samples_the_runs_images_and_has_a_card(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    run = tiny_run(tmp_path / "run")
    npp("sample", run, "--count", "6", "--out", run / "samples/a")
    npp("export", run, "--format", "hub", "--out", "hub", "--dtype", dtype)
    loaded = Transformer.from_pretrained("hub")
    expected = {name: t.to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype])).float()
                for name, t in open_weights(run).read().items()}  # fmt: skip
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
    assert loaded.config == ModelConfig(**open_weights(run).model.arguments())
    card = Path("hub/README.md").read_text()
    assert "![samples](samples.png)" in card
    assert Path("hub/samples.png").read_bytes() == (run / "samples/a/grid.png").read_bytes()
    assert 'npp_ds.load("hub").sample([0, 1], cfg_scale=1.0, seed=0)' in card
    assert "patch_sides" in card and str(tmp_path) not in card
    if dtype == "fp32":
        npp("sample", "hub", "--count", "6")
        (found,) = Path("samples/hub").iterdir()
        assert (load_samples(found)[0] == load_samples(run / "samples/a")[0]).all()
    with pytest.raises(UserError, match="hub: exists already; give --force"):
        npp("export", run, "--format", "hub", "--out", "hub")
    npp("export", run, "--format", "hub", "--out", "hub", "--force")
    assert sorted(p.name for p in Path("hub").iterdir()) == sorted(
        ["README.md", "config.json", "model.safetensors", "samples.png", "tokenizer"]
    )
    assert not list(tmp_path.glob(".hub*"))
    Path("hub").rename(".hub.old")  # as a kill between the two renames leaves it
    monkeypatch.setattr("npp_ds.checkpoint.export.write_atomic", lambda *_: pytest.fail("disk full"))
    with pytest.raises(pytest.fail.Exception):
        npp("export", run, "--format", "hub", "--out", "hub")
    assert Path("hub/README.md").is_file() and not list(tmp_path.glob(".hub*"))


def test_a_card_has_events_samples_and_evaluations_of_its_weights_alone(tmp_path):
    run = tiny_run(tmp_path / "run")
    weights = open_weights(run)
    for name, sha, step in (("own", weights.sha256, weights.step), ("later", "0" * 64, 10 * weights.step)):
        of = {"weights_sha256": sha, "weights": "raw", "checkpoint_step": step}
        write_samples(run / "samples" / name, np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), {**of, "cfg_scale": 3.0})
        found = {"samples": of, "frechet_distance": float(step), "num_images": 2, "num_reference_images": 5}
        (run / "samples" / name / "evaluation.json").write_text(json.dumps({**found, "extractor": "inception"}))
    events = [{"event": "validation", "step": step, "patch_side": 1, "nll": 4.0} for step in (1, 10 * weights.step)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found = read_run_of(weights)
    assert found.evaluation["frechet_distance"] == weights.step and found.samples.name == "own"
    assert [event["step"] for event in found.events] == [1]
    assert read_run(run).samples.name == "later"


def test_a_file_without_a_known_tokenizer_is_exported_with_a_warning_and_other_folders_are_not_replaced(tmp_path):
    torch.save({"model": tiny_model().state_dict()}, tmp_path / "c2i.pt")
    line = [
        "export",
        tmp_path / "c2i.pt",
        "--heads",
        "2",
        "--grid-size",
        "4",
        "--format",
        "hub",
        "--out",
        tmp_path / "hub",
    ]
    assert "will hold no tokenizer (tokenizer: not known" in npp(*line)
    assert "Which tokenizer made the codes is not recorded" in (tmp_path / "hub/README.md").read_text()
    (tmp_path / "hub/config.json").rename(tmp_path / "hub/notes.txt")
    with pytest.raises(UserError, match=r"has no config\.json, so it is not replaced"):
        npp(*line, "--force")
    assert (tmp_path / "hub/notes.txt").is_file()


def test_patches_loss_and_model_need_torch_only():
    """As in an environment with nothing but torch: every other package that we depend on cannot be imported."""
    code = """
import sys
class Blocked:
    names = {"accelerate", "deepspeed", "huggingface_hub", "matplotlib", "PIL", "pydantic", "rich", "safetensors",
             "tensorboard", "torch_fidelity", "typer", "webdataset", "yaml", "transformers"}
    def find_spec(self, name, *_):
        if name.split(".")[0] in self.names:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from npp_ds.model import ModelConfig, Transformer, mean_embedding, patch_cross_entropy
from npp_ds.model.patches import group
model = Transformer(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=8, grid_size=2, num_classes=2))
loss = model(group(torch.zeros(1, 4, dtype=torch.int64), 2), torch.zeros(1, dtype=torch.int64))
assert abs(loss.item() - torch.tensor(8.).log().item()) < 1e-6
assert not hasattr(model, "from_pretrained")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
