"""`npp shards show`: statistics and a picture that show wrong codes or labels."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from forks import run_forked
from image_sets import encoded, save_tiny_tokenizer, shipped_images, write_image_shards
from npp_ds.cli import files
from npp_ds.data.manifest import Manifest
from npp_ds.data.shards import ShardWriter, verify
from npp_ds.errors import UserError
from npp_ds.tokenizer import load_tokenizer, to_uint8
from npp_ds.tokenizer.contents import decode, describe, random_codes, read_contents
from npp_ds.tokenizer.encode import EncodeSettings, Encoding
from npp_ds.tokenizer.loading import tokenizer_of
from npp_ds.tokenizer.sources import open_source
from shard_sets import CROP_NAMES, manifest_of, write_set


@pytest.fixture
def small(tmp_path):
    """Four images of 3 crops of 16 codes: codes 0 to 3 alike, labels 1, 1, 1, 4."""
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        for row, label in enumerate((1, 1, 1, 4)):
            writer.write(f"x{row}", np.full((len(CROP_NAMES), 16), row, np.uint16), label)
    manifest_of([writer.info], vocab_size=8, num_classes=5, class_names=list("abcde")).save(tmp_path)
    return tmp_path


def test_code_usage_and_class_counts_are_those_of_the_set(small):
    contents = read_contents(small)
    assert contents.code_counts.tolist() == [48, 48, 48, 48, 0, 0, 0, 0]
    assert contents.perplexity == pytest.approx(4) and contents.dead_codes == 4
    assert contents.class_counts.tolist() == [0, 3, 0, 0, 1]
    text = "\n".join(describe(contents))
    assert "perplexity 4.0 of 8; 4 dead codes (50.0%)" in text
    assert "0 to 3 images each, 3 without any" in text and re.search(r"\bb +1 +#{40} 3\n", text + "\n")


def test_many_classes_are_shown_by_their_distribution_and_extremes(tmp_path):
    write_set(tmp_path, 400, 2)
    manifest = Manifest.load(tmp_path)
    manifest.model_copy(update={"num_classes": 200}).save(tmp_path)
    lines = describe(read_contents(tmp_path))
    assert len(lines) < 40 and any("190 without any" in line for line in lines)
    assert sum(int(line.split()[-2]) for line in lines if line.endswith((" classes", " class")) and "#" in line) == 200


def test_random_codes_are_a_pure_function_of_the_seed_and_belong_to_their_labels(tmp_path):
    codes, labels = write_set(tmp_path, 120, 3)
    contents = read_contents(tmp_path)
    drawn, drawn_labels = random_codes(tmp_path, contents, classes=4, per_class=5, seed=3)
    assert len(drawn) == 20 and len(set(drawn_labels.tolist())) == 4
    for row, label in zip(drawn, drawn_labels, strict=True):
        assert any((codes[i] == row).all(1).any() for i in np.flatnonzero(labels == label))
    again = random_codes(tmp_path, contents, 4, 5, 3)[0]
    assert np.array_equal(drawn, again)
    assert not np.array_equal(drawn, random_codes(tmp_path, contents, 4, 5, 4)[0])


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """(folder of shards, tokenizer file) of shipped images encoded by a tiny tokenizer."""
    folder = tmp_path_factory.mktemp("tokenized")
    images, labels = shipped_images(20)
    files = {f"n{labels[row]:08d}/{row}.png": encoded(image) for row, image in enumerate(images)}
    write_image_shards(folder / "images", files)
    tokenizer = save_tiny_tokenizer(folder / "tiny.safetensors")
    source = open_source([folder / "images"], "train")
    job = Encoding(source, load_tokenizer(tokenizer), folder / "codes", EncodeSettings("train", 32, "center-flip"))
    job.run()
    job.finish()
    return folder / "codes", tokenizer


@pytest.mark.processes
def test_the_command_prints_the_manifest_and_draws_the_codes_as_images(tokenized, tmp_path, monkeypatch):
    """It finds the tokenizer by itself in the working directory, and asks for it elsewhere."""
    codes, tokenizer = tokenized
    sheet = codes / "contact_sheet.png"
    command = ["npp_ds.cli", "shards", "show", codes, "--classes", "3", "--per-class", "2"]
    done = run_forked(*command, folder=tokenizer.parent)
    assert done.returncode == 0, done.stderr
    assert "tiny.safetensors, SHA-256" in done.stdout and "20 of 20 (0 skipped)" in done.stdout
    assert "perplexity" in done.stdout and str(sheet) in done.stdout
    picture = np.asarray(Image.open(sheet))
    drawn, _ = random_codes(codes, read_contents(codes), 3, 2, seed=0)
    image = decode(load_tokenizer(tokenizer), drawn)[0].repeat(2, 0).repeat(2, 1)
    windows = np.lib.stride_tricks.sliding_window_view(picture, image.shape)[:, :, 0]
    assert any(np.array_equal(window, image) for row in windows[:20] for window in row)
    assert verify(codes) == []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="give its file with --tokenizer"):
        tokenizer_of(Manifest.load(codes).tokenizer)


def test_images_are_those_the_tokenizer_gives_and_another_tokenizer_is_refused(tokenized, tmp_path):
    codes, file = tokenized
    manifest = Manifest.load(codes)
    model = tokenizer_of(manifest.tokenizer, file)
    drawn, _ = random_codes(codes, read_contents(codes), 10, 2, seed=0)
    expected = to_uint8(model.decode(torch.from_numpy(drawn))).numpy()
    assert np.abs(decode(model, drawn, batch_size=3).astype(int) - expected).max() <= 1
    with pytest.raises(UserError, match=r"the codes were made by tiny\.safetensors"):
        tokenizer_of(manifest.tokenizer, save_tiny_tokenizer(tmp_path / "tiny.safetensors", seed=1))


def test_counts_that_do_not_add_up_and_damage_are_found(tokenized, small):
    manifest = Manifest.load(small)
    manifest.model_copy(update={"source": {"images": 5}}).save(small)
    assert verify(small) == [
        f"{small / 'manifest.json'}: 5 images in the source, 4 in the shards and 0 skipped do not add up; "
        "tokenize again or restore the file."
    ]
    path = small / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="do not add up"):
        read_contents(small)
    manifest.save(small)
    with pytest.raises(UserError, match=r"train-000000\.tar: found"):
        read_contents(small)


def test_a_mistyped_folder_is_not_made(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json"):
        files.show(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
