"""The shipped images are the original ones, and the converter makes them again byte for byte."""

import gzip
import runpy
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "data_prep" / "fashion_mnist"
SCRIPT = ROOT / "data_prep" / "fashion_mnist.py"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


CONVERTER = runpy.run_path(str(SCRIPT))


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the command line; returns its exit code and what it wrote to stderr."""

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        return CONVERTER["main"](), capsys.readouterr().err

    return run


def read(split: str) -> list[tuple[str, np.ndarray, int]]:
    shards = [str(path) for path in sorted(SHIPPED.glob(f"{split}-*.tar.gz"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls")
    return list(dataset)


@pytest.fixture(scope="module")
def shipped():
    return {split: read(split) for split in ("train", "val")}


@pytest.fixture
def idx_folder(tmp_path):
    """25 random images as IDX files: images gzipped, labels plain."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (25, 28, 28), np.uint8), rng.integers(0, 10, 25).astype(np.uint8)
    folder = tmp_path / "idx"
    folder.mkdir()
    header = b"\x00\x00\x08\x03" + struct.pack(">3I", *images.shape)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = b"\x00\x00\x08\x01" + struct.pack(">I", 25)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return folder, images, labels


def test_stock_webdataset_reads_9000_training_and_1000_validation_images_of_ten_classes(shipped):
    assert {split: len(samples) for split, samples in shipped.items()} == {"train": 9000, "val": 1000}
    labels = Counter(label for samples in shipped.values() for _, _, label in samples)
    assert labels == dict.fromkeys(range(10), 1000)
    assert all(image.shape == (32, 32, 3) for _, image, _ in shipped["val"])


def test_every_tenth_image_and_no_other_is_held_out(shipped):
    ids = {split: [int(key.removeprefix("test-")) for key, _, _ in samples] for split, samples in shipped.items()}
    assert ids["val"] == list(range(9, 10000, 10))
    assert sorted(ids["train"] + ids["val"]) == list(range(10000))


def test_images_keep_a_black_border_of_two_pixels(shipped):
    images = np.stack([image for _, image, _ in shipped["val"]])
    border = np.ones((32, 32), bool)
    border[2:-2, 2:-2] = False
    assert images[:, border].max() == 0 and images[:, ~border].mean() > 60


def test_class_names_and_licence_are_beside_the_images():
    names = (SHIPPED / "classes.txt").read_text().splitlines()
    assert len(names) == 10 and names[0] == "T-shirt/top" and names[9] == "Ankle boot"
    licence = (SHIPPED / "LICENSE").read_text()
    assert "Zalando SE" in licence and "Permission is hereby granted" in licence
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 6e6


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_command_in_the_readme_makes_the_shipped_bytes_again(convert, tmp_path):
    command = next(line for line in (SHIPPED / "README.md").read_text().splitlines() if line.startswith("    python "))
    arguments = command.split()[2:]
    arguments[arguments.index("--out") + 1] = str(tmp_path)
    assert convert(*arguments) == (0, "")
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in SHIPPED.iterdir() if path.name not in ("LICENSE", "README.md"))
    for name in made:
        ours, theirs = (tmp_path / name).read_bytes(), (SHIPPED / name).read_bytes()
        if name.endswith(".gz"):  # zlib versions may compress differently
            ours, theirs = gzip.decompress(ours), gzip.decompress(theirs)
        assert ours == theirs, name


def test_the_converter_keeps_pixels_and_labels_and_gives_equal_bytes_twice(convert, idx_folder, tmp_path):
    folder, images, labels = idx_folder
    for out in ("a", "b"):
        assert convert("--idx", folder, "--split", "test", "--out", tmp_path / out, "--samples-per-shard", "10") == (
            0,
            "",
        )
    files = sorted(path.name for path in (tmp_path / "a").glob("*.tar.gz"))
    assert files == ["test-000000.tar.gz", "test-000001.tar.gz", "test-000002.tar.gz"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    shards = [str(tmp_path / "a" / name) for name in files]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("l8").to_tuple("__key__", "png", "cls"))
    assert [key for key, _, _ in samples] == [f"test-{i:05d}" for i in range(25)]
    assert np.array_equal(np.stack([image for _, image, _ in samples])[:, 2:-2, 2:-2], images)
    assert [label for _, _, label in samples] == labels.tolist()


DAMAGE = {
    "cut": lambda data: data[:-3],
    "text": lambda data: b"<html>",
    "cut header": lambda data: data[:6],
    "255 dimensions": lambda data: b"\0\0\x08\xff" + bytes(1020),
    "cut gzip": lambda data: gzip.compress(data)[:-9],
    "damaged gzip": lambda data: gzip.compress(data)[:10] + b"\xff" * 20,
}


@pytest.mark.parametrize("damage", ["missing", *DAMAGE])
def test_wrong_idx_files_give_one_line_naming_the_file_and_exit_code_2(damage, convert, idx_folder, tmp_path):
    path = idx_folder[0] / "t10k-labels-idx1-ubyte"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    code, stderr = convert("--idx", idx_folder[0], "--split", "test", "--out", tmp_path / "out")
    assert code == 2 and "t10k-labels-idx1-ubyte" in stderr
    assert len(stderr.splitlines()) == 1 and not list(tmp_path.glob("out/*.gz"))


def test_a_full_disk_leaves_no_half_shard(idx_folder, tmp_path):
    images, labels = CONVERTER["load_split"](idx_folder[0], "test")

    def samples():
        yield "test-00000", images[0], int(labels[0])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        CONVERTER["write_shard"](tmp_path / "test-000000.tar.gz", samples())
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]
