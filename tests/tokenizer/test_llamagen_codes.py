"""`npp shards import-llamagen`: the folders of the published extraction become the shards that tokenizing makes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from image_sets import TINY, save_tiny_tokenizer
from npp_ds.cli import app
from npp_ds.data.manifest import Manifest
from npp_ds.data.shards import read_set, verify
from npp_ds.errors import UserError
from npp_ds.tokenizer import llamagen_codes
from npp_ds.tokenizer.loading import load_tokenizer, tokenizer_of


def extract(folder: Path, count: int, crops: int, processes: int = 1, dtype=np.int64, seed: int = 0) -> list[str]:
    """Writes what extract_codes_c2i.py writes with this many processes; returns the two folders."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 64, (count, crops, 16))
    for name in ("codes", "labels"):
        (folder / f"imagenet256_{name}").mkdir(parents=True)
    for i in range(-(-count // processes) * processes):  # its sampler fills up with the first images
        np.save(folder / f"imagenet256_codes/{i}.npy", codes[None, i % count].astype(dtype))
        np.save(folder / f"imagenet256_labels/{i}.npy", np.array([i % count // 4]))
    return [str(folder / "imagenet256_codes"), str(folder / "imagenet256_labels")]


def run(*line: str | Path) -> str:
    done = CliRunner().invoke(app, ["shards", "import-llamagen", *map(str, line)])
    if done.exception:
        raise done.exception
    return done.output


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shards_hold_the_codes_and_labels_in_their_order_without_the_samplers_padding(tmp_path):
    folders = extract(tmp_path, 22, 10, processes=8)
    out = tmp_path / "out"
    told = run(*folders, "--out", out, "--samples-per-shard", 10, "--vocab-size", 64)
    assert "22 images, 10 crops each, 3 shards\n2 files at the end, equal to the first ones, left out" in told
    assert told.count("WARNING: ") == 1 and "WARNING: which tokenizer made these codes is not recorded" in told
    assert verify(out) == []
    manifest = Manifest.load(out)
    assert (manifest.grid_size, manifest.image_size, manifest.num_classes) == (4, 64, 1000)
    assert manifest.crops.names[:5] == [
        f"1.1/{n}" for n in ("top-left", "top-right", "bottom-left", "bottom-right", "center")
    ]
    for i, (codes, label) in enumerate(read_set(out, manifest)):
        assert np.array_equal(codes, np.load(f"{folders[0]}/{i}.npy")[0]) and label == i // 4
    assert i == 21
    assert manifest.coding.tokenizer.sha256 == "" and manifest.tokenizer.precision == "tf32"
    with pytest.raises(UserError, match="not known which one made the codes; give its name or file with --tokenizer"):
        tokenizer_of(manifest.tokenizer)
    file = save_tiny_tokenizer(tmp_path / "vq.safetensors")
    assert tokenizer_of(manifest.tokenizer, file).sha256, "any tokenizer may decode codes whose own is unknown"


@pytest.mark.parametrize("crops, scheme", [(1, "center"), (2, "center-flip"), (20, "ten")])
def test_one_two_and_twenty_crops_and_a_named_tokenizer(tmp_path, crops, scheme):
    file = save_tiny_tokenizer(tmp_path / "vq.safetensors")
    folders = extract(tmp_path / "a", 6, min(crops, 10), processes=4, dtype=np.int32)
    more = []
    if crops == 20:
        more = ["--more-codes", extract(tmp_path / "b", 6, 10, processes=1, seed=1)[0]]
    run(*folders, "--out", tmp_path / "out", "--tokenizer", file, "--class-list", "imagenet", *more)
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.crops.scheme, manifest.num_crops) == (scheme, crops)
    assert manifest.crops.ranges == ([1.1, 1.05] if crops == 20 else [])
    assert (manifest.vocab_size, manifest.image_size) == (TINY.codebook_size, 4 * TINY.downsample)
    assert manifest.tokenizer.sha256 == load_tokenizer(file).sha256
    assert manifest.class_names[207] == "golden retriever" and len(manifest.class_names) == 1000
    if crops == 20:
        codes = [found for found, _ in read_set(tmp_path / "out", manifest)]
        assert np.array_equal(codes[3][10:], np.load(f"{more[1]}/3.npy")[0])


def test_an_interrupted_import_resumes_with_the_same_bytes_and_reads_finished_shards_no_more(tmp_path, monkeypatch):
    folders = extract(tmp_path, 30, 2)
    line = [*folders, "--samples-per-shard", 8, "--vocab-size", 64]
    run(*line, "--out", tmp_path / "whole")
    (tmp_path / "imagenet256_codes/20.npy").rename(tmp_path / "hidden")
    (tmp_path / "imagenet256_codes/20.npy").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"codes/20\.npy: unreadable"):
        run(*line, "--out", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*")) == [
        ".unfinished",
        "train-000000.tar",
        "train-000001.tar",
    ]
    (tmp_path / "hidden").replace(tmp_path / "imagenet256_codes/20.npy")
    (tmp_path / "out/train-000001.tar").write_bytes(b"damaged after it was finished")
    seen = []
    read = llamagen_codes.CodeFolders.read
    monkeypatch.setattr(llamagen_codes.CodeFolders, "read", lambda self, image: seen.append(image) or read(self, image))
    run(*line, "--out", tmp_path / "out")
    assert sorted(seen) == list(range(8, 30))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    run(*line, "--out", tmp_path / "out")
    assert sorted(seen) == list(range(8, 30)) and content(tmp_path / "out") == content(tmp_path / "whole")
    message = r"holds shards made with other settings .*num_classes: found 1000, requested 10"
    with pytest.raises(UserError, match=message):
        run(*line, "--out", tmp_path / "out", "--num-classes", 10)


def test_shards_of_other_labels_are_made_again_and_a_complete_set_is_refused(tmp_path):
    line = [*extract(tmp_path, 30, 2), "--samples-per-shard", 8, "--vocab-size", 64]
    codes, labels = (tmp_path / f"imagenet256_{name}" for name in ("codes", "labels"))
    (codes / "20.npy").rename(tmp_path / "hidden")
    (codes / "20.npy").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"codes/20\.npy: unreadable"):
        run(*line, "--out", tmp_path / "out")
    (tmp_path / "hidden").replace(codes / "20.npy")
    np.save(labels / "9.npy", np.array([7]))
    run(*line, "--out", tmp_path / "whole")
    run(*line, "--out", tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    shutil.copytree(tmp_path / "out", tmp_path / "old")
    made = Manifest.load(tmp_path / "old")  # as versions wrote it that did not record what shards were made of
    del made.source["inputs"]
    made.save(tmp_path / "old")
    fingerprint = Manifest.load(tmp_path / "old").fingerprint()
    run(*line, "--out", tmp_path / "old")
    assert Manifest.load(tmp_path / "old").fingerprint() == fingerprint, "runs that trained on it resume"
    np.save(labels / "9.npy", np.array([6]))
    with pytest.raises(UserError, match=r"holds shards of other labels or codes, train-000001\.tar among them"):
        run(*line, "--out", tmp_path / "out")
    assert not verify(tmp_path / "out")


def damage(folder: Path, what: str) -> None:
    codes, labels = folder / "imagenet256_codes", folder / "imagenet256_labels"
    match what:
        case "gap":
            (codes / "3.npy").unlink(), (labels / "3.npy").unlink()
        case "fewer labels":
            (labels / "7.npy").unlink()
        case "code":
            np.save(codes / "5.npy", np.full((1, 2, 16), 64))
        case "negative":
            np.save(codes / "5.npy", np.full((1, 2, 16), -1))
        case "label":
            np.save(labels / "5.npy", np.array([1000]))
        case "floats":
            np.save(codes / "5.npy", np.zeros((1, 2, 16)))
        case "pickle":
            np.save(codes / "5.npy", np.array([{}], dtype=object), allow_pickle=True)
        case "shape":
            np.save(codes / "5.npy", np.zeros((1, 2, 9), int))
        case "no crops":
            np.save(codes / "0.npy", np.zeros((2, 16), int))
        case "text":
            np.save(codes / "0.npy", np.zeros((1, 120, 2048), int))
        case "empty":
            shutil.rmtree(codes)
            codes.mkdir()


@pytest.mark.parametrize(
    "what, message",
    [
        ("gap", r"codes: 3\.npy is missing among 7 numbered files"),
        ("fewer labels", r"codes has 8 files, .*labels has 7"),
        ("code", r"codes/5\.npy: code 64, expected 0 to 63; give the vocabulary \(--vocab-size\)"),
        ("negative", r"codes/5\.npy: code -1, expected 0 to 63"),
        ("label", r"labels/5\.npy: label 1000, expected 0 to 999; give their number \(--num-classes\)"),
        ("floats", r"codes/5\.npy: float64, expected integers"),
        ("pickle", r"codes/5\.npy: unreadable"),
        ("shape", r"codes/5\.npy: shape \[1, 2, 9\], expected \[1, 2, 16\] as in 0\.npy"),
        ("no crops", r"codes/0\.npy: shape \[2, 16\], expected \[1, crops, tokens\]"),
        ("text", r"codes/0\.npy: shape \[1, 120, 2048\], expected \[1, crops, tokens\] with a square number"),
        ("empty", r"codes: holds no 0\.npy; finish"),
    ],
)
def test_bad_folders_are_one_line_and_leave_no_manifest(tmp_path, what, message):
    folders = extract(tmp_path, 8, 2)
    damage(tmp_path, what)
    with pytest.raises(UserError, match=message) as error:
        run(*folders, "--out", tmp_path / "out", "--vocab-size", 64)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out/manifest.json").exists()
