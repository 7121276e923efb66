"""Sampling from Python gives the images of `npp sample`; docs/python.md and docs/quickstart.ipynb run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import npp_ds
from image_sets import TINY, few_images, save_tiny_tokenizer
from npp_ds.cli import app
from npp_ds.data.manifest import TokenizerInfo
from npp_ds.errors import UserError
from npp_ds.sampling.folder import load_samples
from npp_ds.utils.files import sha256
from sample_sets import tiny_run
from shard_sets import manifest_of

ROOT = Path(__file__).parents[2]
NAMES = ["Sneaker", "Bag", "Coat"]


@pytest.fixture
def named_run(tmp_path, monkeypatch) -> Path:
    """runs/quickstart in the working folder: a tiny run whose shards name the classes and the tokenizer."""
    monkeypatch.chdir(tmp_path)
    file = save_tiny_tokenizer(tmp_path / "vq.safetensors")
    made_by = TokenizerInfo(name=file.name, sha256=sha256(file), downsample=TINY.downsample, precision="fp32")
    (tmp_path / "train").mkdir()
    manifest_of([], num_classes=3, class_names=NAMES, vocab_size=64, tokenizer=made_by).save(tmp_path / "train")
    return tiny_run(Path("runs/quickstart"), train=tmp_path / "train")


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_the_images_are_those_of_the_command_from_every_kind_of_source(named_run):
    line = ["--classes", "bag,Sneaker", "--per-class", "5", "--cfg-scale", "3", "--seed", "7", "--top-k", "9"]
    for command in (
        ["sample", "runs/quickstart", *line, "--out", "out", "--batch-size", "4"],
        ["export", "runs/quickstart", "--out", "file.safetensors"],
        ["export", "runs/quickstart", "--out", "file.pt", "--format", "published"],
        ["export", "runs/quickstart", "--out", "hub", "--format", "hub"],
    ):
        assert (done := CliRunner().invoke(app, command)).exit_code == 0, done.exception
    expected = load_samples("out")[0]
    options = {"per_class": 5, "cfg_scale": 3, "seed": 7, "top_k": 9, "batch_size": 4}
    for source in ("runs/quickstart", "file.safetensors", "hub"):
        assert np.array_equal(arrays(npp_ds.load(source).sample(["Bag", "Sneaker"], **options)), expected), source
    published = npp_ds.load("file.pt", tokenizer="vq.safetensors", heads=2, grid_size=4)
    assert np.array_equal(arrays(published.sample([1, 0], **options)), expected)
    with pytest.warns(UserWarning, match="does not contain its grid size; assuming 16x16"):
        npp_ds.load("file.pt", tokenizer="vq.safetensors", heads=2)
    assert len(npp_ds.load("hub").sample()) == 3, "one of each class"


def test_what_is_impossible_is_named(named_run):
    model = npp_ds.load("runs/quickstart")
    with pytest.raises(UserError, match=r"found Sneakers, did you mean Sneaker\?"):
        model.sample("Sneakers")
    with pytest.raises(UserError, match=r"count: found 0.*cfg_scale: found -1"):
        model.sample("Bag", 0, cfg_scale=-1)
    with pytest.raises(UserError, match="not found; expected the folder of a run"):
        npp_ds.load("nowhere")


def test_every_line_of_the_page_runs(named_run, capsys):
    text = (ROOT / "docs/python.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert "did you mean Sneaker?" in capsys.readouterr().out
    assert Path("sneaker.png").is_file() and 0 < names["nats_per_code"].item() < 20
    pixels = arrays(names["images"])
    assert pixels.shape == (2, 16, 16, 3) and names["reconstructed"].shape == (2, 16, 16, 3)
    fixed = r"npp sample runs/quickstart (.*?)`"
    assert CliRunner().invoke(app, ["sample", "runs/quickstart", *re.search(fixed, text)[1].split()]).exit_code == 0
    (folder,) = Path("runs/quickstart/samples").iterdir()
    assert np.array_equal(load_samples(folder)[0][0], np.asarray(Image.open("sneaker.png")))


def test_importing_the_package_imports_no_torch():
    code = "import sys, npp_ds; npp_ds.__version__; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.slow
@pytest.mark.processes
def test_the_notebook_goes_from_images_to_samples(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for split, count in (("train", 64), ("val", 32)):
        few_images(tmp_path / "data_prep/fashion_mnist", split, count)
    (tmp_path / "data_prep/fashion_mnist/classes.txt").symlink_to(ROOT / "data_prep/fashion_mnist/classes.txt")
    (tmp_path / "data_prep/tokenize_imagenet.py").symlink_to(ROOT / "data_prep/tokenize_imagenet.py")
    (tmp_path / "docs").mkdir()
    notebook = nbformat.read(ROOT / "docs/quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    tiny = "schedule.batch_size=16 model.dim=32 model.n_layers=1 model.n_heads=2 logging.every=1"
    parameters.source = parameters.source.replace('""', f'"{tiny} data.cache_dir={tmp_path}/cache"')
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=150, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == 2
