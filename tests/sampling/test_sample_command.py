"""`npp sample`: what it refuses before it loads or writes anything, and what it prints about the weights."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from image_sets import save_tiny_tokenizer
from npp_ds.cli import app
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer
from npp_ds.sampling.folder import load_samples, newest_samples
from sample_sets import MODEL, tiny_run


@pytest.fixture
def run_dir(tmp_path):
    return tiny_run(tmp_path / "run", stage=0)


def npp(*line: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, line)))


def refusal(*line: str | Path) -> str:
    done = npp(*line)
    assert isinstance(done.exception, UserError), done.exception
    assert not done.output, "what is refused is not warned about first"
    return str(done.exception)


def published_384(path: Path) -> Path:
    """A published checkpoint of a 384 px model: nothing in it tells that its grid is 24 x 24."""
    model = Transformer(ModelConfig(**{**MODEL, "grid_size": 24, "dim": 64, "n_heads": 4}))
    torch.save({"model": model.state_dict()}, path)
    return path


def test_the_grid_and_heads_of_a_published_checkpoint_are_options_and_a_guess_gives_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, tokenizer = published_384(tmp_path / "c2i_384.pt"), save_tiny_tokenizer(tmp_path / "vq.safetensors")
    line = ["sample", file, "--tokenizer", tokenizer, "--count", "3"]
    told = npp(*line, "--grid-size", "24", "--heads", "4", "--out", "told")
    assert told.exit_code == 0, told.exception
    assert f"{file}: c2i_384, raw weights:" in told.output and "layers of 4 heads, dim 64" in told.output
    assert "grid 24x24" in told.output and "WARNING" not in told.output
    assert load_samples(tmp_path / "told")[0].shape == (3, 96, 96, 3)
    guessed = npp(*line, "--heads", "4", "--out", "guessed")
    warning = f"WARNING: {file} does not contain its grid size; assuming 16x16, set --grid-size if that is wrong"
    assert guessed.exit_code == 0 and warning in guessed.output
    for command in ("import", "export"):
        assert warning in npp(command, file, "--heads", "4", "--out", f"{command}.safetensors").output
        done = npp(command, file, "--heads", "4", "--grid-size", "24", "--out", f"{command}24.safetensors")
        assert done.exit_code == 0 and "WARNING" not in done.output
        assert "grid 24x24" in npp("sample", f"{command}24.safetensors", *line[2:], "--out", command).output


@pytest.mark.parametrize(
    "option, value",
    [
        ("cfg-scale", "-1"), ("temperature", "-1"), ("top-k", "-3"), ("top-p", "0"), ("patch-side", "3"),
        ("cfg-schedule", "steep"), ("cfg-power", "2"), ("cfg-interval", "-2"), ("labels", "sorted"), ("dtype", "fp8"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_anything_is_read_or_written(run_dir, tmp_path, monkeypatch, option, value):
    monkeypatch.setattr("npp_ds.checkpoint.open.Weights.reading", lambda *_: pytest.fail("weights were read"))
    out = tmp_path / "out"
    assert f"{option.replace('-', '_')}: found" in refusal("sample", run_dir, f"--{option}", value, "--out", out)
    assert not out.exists()


def test_samples_of_a_file_are_found_by_its_name(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert npp("export", run_dir, "--out", "tiny.safetensors").exit_code == 0
    with pytest.raises(UserError, match=r"tiny\.safetensors: has no samples; expected some in samples/tiny"):
        newest_samples("tiny.safetensors")
    for source in ("tiny.safetensors", run_dir):
        done = npp("sample", source, "--tokenizer", run_dir / "vq.safetensors", "--count", "3")
        assert f"3 images of step 120 in {newest_samples(source)}: " in done.output


def test_an_out_that_is_no_folder_is_named(run_dir, tmp_path):
    (tmp_path / "notes").write_text("mine")
    for out in (tmp_path / "notes", tmp_path / "notes/below"):
        assert f"{out}: found a file, expected a folder; name another one" in refusal("sample", run_dir, "--out", out)
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "{"])
def test_a_folder_with_an_invalid_record_is_refused(run_dir, tmp_path, text):
    assert npp("sample", run_dir, "--count", "3", "--out", tmp_path / "out").exit_code == 0
    (tmp_path / "out/samples.json").write_text(text)
    with pytest.raises(UserError, match="no finished samples"):
        load_samples(tmp_path / "out")
    assert "samples.json: damaged" in refusal("sample", run_dir, "--count", "3", "--out", tmp_path / "out")


@pytest.mark.parametrize("tokenizer", ["x", {}, {"name": 3}, None])
def test_a_record_with_an_invalid_tokenizer_is_refused(run_dir, tmp_path, tokenizer):
    assert npp("sample", run_dir, "--count", "3", "--out", tmp_path / "out").exit_code == 0
    record = json.loads((tmp_path / "out/samples.json").read_text())
    (tmp_path / "out/samples.json").write_text(json.dumps({**record, "tokenizer": tokenizer}))
    with pytest.raises(UserError, match=r"samples\.json has a tokenizer without a name"):
        load_samples(tmp_path / "out")
