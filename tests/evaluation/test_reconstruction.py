"""`npp evaluate --reconstruction`: a tokenizer's own distance."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from image_sets import few_images
from npp_ds.cli import app
from npp_ds.errors import UserError
from npp_ds.evaluation.images import open_images, reconstructed
from npp_ds.tokenizer import load_tokenizer, to_input, to_uint8


def npp(*line):
    return CliRunner().invoke(app, ["evaluate", *map(str, line)])


def test_images_are_compared_with_what_the_tokenizer_makes_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few_images(tmp_path, "val", 40)
    line = ["--reconstruction", tmp_path, "--tokenizer", "fashion_mnist", "--extractor", "fashion_mnist"]
    done = npp(*line)
    assert done.exit_code == 0, done.exception
    assert "40 reconstructions of" in done.output
    result = json.loads(Path("reconstruction.json").read_text())
    assert 0 < result["frechet_distance"] < 40 and result["class_agreement"] > 0.8
    assert result["samples"]["tokenizer"]["name"] == "fashion_mnist"
    assert result["samples_sha256"] != result["reference"]["pixels_sha256"]
    tokenizer, images = load_tokenizer("fashion_mnist"), open_images(tmp_path)
    (batch,) = images.batches(40)
    (found,) = reconstructed(images, tokenizer, "cpu").batches(40)
    one = to_uint8(tokenizer.decode(tokenizer.encode(to_input(torch.from_numpy(batch[:1])))))
    assert np.abs(found[0].astype(int) - one[0].numpy()).max() <= 1
    for arguments, message in (
        (line[:2], "--tokenizer: missing"),
        ([], "--reference: missing"),
        ([*line, "--sweep", "cfg=1,2"], "found --reconstruction and --sweep, expected one of them"),
    ):
        assert message in str(npp(*arguments).exception)
    with pytest.raises(UserError, match="30x30 pixels; fashion_mnist encodes squares whose side is a multiple of 4"):
        next(reconstructed(open_images(tmp_path, 30), tokenizer, "cpu").batches(4))
