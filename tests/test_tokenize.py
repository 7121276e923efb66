"""Images become shards of codes: same bytes for any number of processes and interruptions, nothing silently missing."""

import hashlib
import io
import json
import runpy
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from npp_ds.data.shards import Manifest, read_shard, verify
from npp_ds.errors import UserError
from npp_ds.tokenizer import VQConfig, VQModel, load_tokenizer, save_tokenizer, to_input
from npp_ds.tokenizer.encode import EncodeSettings, Encoding
from npp_ds.tokenizer.sources import load_images, open_source, read_images

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "data_prep" / "tokenize_imagenet.py"
SHIPPED = ROOT / "data_prep" / "fashion_mnist"
TINY = VQConfig(8, (1, 2, 2), num_res_blocks=1, z_channels=8, codebook_size=64, codebook_dim=4, norm_groups=4)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    torch.manual_seed(0)
    model = VQModel(TINY)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.safetensors"
    save_tokenizer(model, path, {})
    return path


@pytest.fixture(scope="module")
def shipped_images():
    images, labels = load_images(open_source([SHIPPED], "val"), 32)
    return images[:60], labels[:60]


@pytest.fixture(scope="module")
def image_shards(shipped_images, tmp_path_factory):
    """60 shipped images in one .tar and one .tar.gz."""
    folder = tmp_path_factory.mktemp("shards")
    images, labels = shipped_images
    for shard, (name, rows) in enumerate((("train-0.tar", range(25)), ("train-1.tar.gz", range(25, 60)))):
        with webdataset.TarWriter(str(folder / name), encoder=False) as tar:
            for row in rows:
                sample = {"png": encoded(images[row]), "json": b"{}", "cls": str(labels[row]).encode()}
                tar.write({"__key__": f"{shard}/image{row}", **sample})
    shutil.copy(SHIPPED / "classes.txt", folder)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line; returns its exit code and what it wrote to stderr."""

    def run(*arguments) -> tuple[int, str]:
        code = run_script(None, [str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", [])
    return run


def run_script(_, arguments: list[str]) -> int:
    sys.argv = [str(SCRIPT), *arguments]
    return runpy.run_path(str(SCRIPT))["main"]()


def encoded(pixels: np.ndarray, format: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def arguments(images: Path, out: Path, tokenizer: Path, /, **more) -> list[str]:
    options = {"image-size": 32, "crops": "center-flip", "samples-per-shard": 16, "batch-size": 10, "device": "cpu"}
    options |= {"images": images, "out": out, "tokenizer": tokenizer, **more}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def encoding(images: Path, out: Path, tokenizer: Path, **changes) -> Encoding:
    settings = {"image_size": 32, "crops": "center-flip", "samples_per_shard": 16, "crop_batch_size": 10} | changes
    source = open_source([images], "train")
    return Encoding(source, load_tokenizer(tokenizer), out, EncodeSettings(split="train", **settings))


@pytest.fixture(scope="module")
def codes(image_shards, tokenizer_file, tmp_path_factory):
    """What one undisturbed process makes of `image_shards`."""
    out = tmp_path_factory.mktemp("codes")
    job = encoding(image_shards, out, tokenizer_file)
    assert job.run() == 60
    job.finish()
    return out


def test_the_set_is_sound_and_its_manifest_says_how_it_was_made(codes, tokenizer_file):
    assert verify(codes) == []
    manifest = Manifest.load(codes)
    assert [shard.samples for shard in manifest.shards] == [16, 16, 16, 12] and manifest.num_samples == 60
    assert (manifest.grid_size, manifest.vocab_size, manifest.num_classes, manifest.image_size) == (8, 64, 10, 32)
    assert manifest.class_names[9] == "Ankle boot" and manifest.crops.names == ["center", "center-flip"]
    assert manifest.tokenizer.sha256 == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    assert manifest.source["kind"] == "webdataset" and manifest.source["images"] == 60 and manifest.skipped == []


def test_stored_codes_and_labels_are_those_of_each_image_encoded_alone(codes, shipped_images, tokenizer_file):
    images, labels = shipped_images
    model = load_tokenizer(tokenizer_file)
    samples = [sample for path in sorted(codes.glob("*.tar")) for sample in read_shard(path)]
    assert [key for key, _, _ in samples] == [f"{int(row >= 25)}/image{row}" for row in range(60)]
    assert [label for _, _, label in samples] == labels.tolist()
    for image, (_, stored, _) in zip(images, samples, strict=True):
        both = torch.from_numpy(np.stack([image, image[:, ::-1]]))
        assert stored.dtype == np.uint16 and np.array_equal(stored, model.encode(to_input(both)).numpy())


def test_two_processes_write_the_bytes_of_one(codes, image_shards, tokenizer_file, tmp_path, pair):
    line = arguments(image_shards, tmp_path / "out", tokenizer_file, workers=0)
    assert pair.run(run_script, line) == [0, 0]
    assert digests(tmp_path / "out") == digests(codes)


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_bytes(world_size, codes, image_shards, tokenizer_file, tmp_path):
    class Interrupted(Exception):
        pass

    first = encoding(image_shards, tmp_path, tokenizer_file)
    encode, calls = first.encoder.encode, iter(range(5))

    def stopping(squares):
        if next(calls, None) is None:
            raise Interrupted
        return encode(squares)

    first.encoder.encode = stopping
    with pytest.raises(Interrupted):
        first.run()
    assert [path.name for path in tmp_path.glob("*.tar")] == ["train-000000.tar"]
    assert not (tmp_path / "manifest.json").exists()
    again = encoding(image_shards, tmp_path, tokenizer_file)
    assert sum(again.run(rank, world_size) for rank in range(world_size)) == 60 - 16
    again.finish()
    assert digests(tmp_path) == digests(codes)
    assert not (tmp_path / ".unfinished").exists() and not list(tmp_path.glob(".*.tmp"))


def test_a_damaged_or_lost_shard_is_made_again_and_the_others_are_kept(codes, image_shards, tokenizer_file, tmp_path):
    shutil.copytree(codes, tmp_path / "out")
    (tmp_path / "out" / "train-000001.tar").unlink()
    damaged = bytearray((tmp_path / "out" / "train-000003.tar").read_bytes())
    damaged[700] ^= 1
    (tmp_path / "out" / "train-000003.tar").write_bytes(damaged)
    job = encoding(image_shards, tmp_path / "out", tokenizer_file)
    assert job.run() == 16 + 12
    job.finish()
    assert digests(tmp_path / "out") == digests(codes)


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_made_with_other_settings_is_refused_with_the_difference(
    finished, codes, image_shards, tokenizer_file, tmp_path, command
):
    if finished:
        shutil.copytree(codes, tmp_path / "out")
    else:
        encoding(image_shards, tmp_path / "out", tokenizer_file).run()
    before = digests(tmp_path / "out")
    code, stderr = command(*arguments(image_shards, tmp_path / "out", tokenizer_file, crops="center"))
    assert code == 2 and "crops.scheme: it has 'center-flip', asked for 'center'" in stderr
    assert len(stderr.splitlines()) == 1 and digests(tmp_path / "out") == before


def test_an_image_folder_tree_gives_the_codes_of_the_same_images_in_shards(
    codes, shipped_images, tokenizer_file, tmp_path, command
):
    images, labels = shipped_images
    for row, label in enumerate(labels):
        folder = tmp_path / "images" / "train" / f"n{label:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{folder.name}_{row}.png" if row % 2 else f"odd name é.{row}.PNG"
        (folder / name).write_bytes(encoded(images[row]))
    (tmp_path / "images" / "train" / "n00000000" / "notes.txt").write_text("not an image")
    line = arguments(tmp_path / "images", tmp_path / "out", tokenizer_file)
    assert command(*line)[0] == 0
    assert verify(tmp_path / "out") == []
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.class_names == [f"n{label:08d}" for label in range(10)]
    wanted = sorted((label, stored.tobytes()) for path in codes.glob("*.tar") for _, stored, label in read_shard(path))
    found = [sample for path in (tmp_path / "out").glob("*.tar") for sample in read_shard(path)]
    assert sorted((label, stored.tobytes()) for _, stored, label in found) == wanted


@pytest.fixture
def mixed_folder(shipped_images, tmp_path):
    """Five readable images of several kinds and three unreadable ones."""
    image = shipped_images[0][0]
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / "same.png").write_bytes(encoded(image))
    (folder / "same.jpg").write_bytes(encoded(image, "JPEG"))
    (folder / "cmyk.jpeg").write_bytes(encoded(image, "JPEG", "CMYK"))
    (folder / "grey.jpg").write_bytes(encoded(image, "JPEG", "L"))
    (folder / "w.webp").write_bytes(encoded(image, "WEBP"))
    (folder / "cut.jpg").write_bytes(encoded(image, "JPEG")[:-80])
    (folder / "empty.jpg").touch()
    (folder / "text.JPEG").write_text("hello")
    return folder.parent


def test_unreadable_images_are_listed_with_reasons_and_counts_add_up(mixed_folder, tokenizer_file, tmp_path, command):
    line = arguments(mixed_folder, tmp_path / "out", tokenizer_file)
    assert command(*line, "--max-skipped", "0.5")[0] == 0
    manifest = Manifest.load(tmp_path / "out")
    skipped = [json.loads(text) for text in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert manifest.num_samples == 5 and manifest.source["images"] == 8 and skipped == manifest.skipped
    assert [Path(entry["path"]).name for entry in skipped] == ["cut.jpg", "empty.jpg", "text.JPEG"]
    assert all(entry["reason"] for entry in skipped)
    assert [key for key, _, _ in read_shard(tmp_path / "out" / "train-000000.tar")] == [
        "a/cmyk", "a/grey", "a/same", "a/same-2", "a/w",
    ]  # fmt: skip


def test_too_many_unreadable_images_stop_the_run_and_say_where_they_are_listed(
    mixed_folder, tokenizer_file, tmp_path, command
):
    line = arguments(mixed_folder, tmp_path / "out", tokenizer_file)
    code, stderr = command(*line)
    assert code == 2 and "3 of 8 images" in stderr and "skipped.jsonl" in stderr
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert command(*line, "--max-skipped", "0.4")[0] == 0


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"images": "/nowhere"}, "/nowhere"),
        ({"split": "test"}, "test-*.tar"),
        ({"tokenizer": "cifar"}, "fashion_mnist"),
        ({"image-size": 30}, "multiple of 4"),
        ({"crop-range": 1.1}, "only 'ten' takes ranges"),
        ({"class-names": __file__ + ".missing"}, "class names"),
    ],
)
def test_wrong_arguments_give_one_line_and_exit_code_2(
    change, expected, image_shards, tokenizer_file, tmp_path, command
):
    code, stderr = command(*arguments(image_shards, tmp_path / "out", tokenizer_file, **{"split": "train"} | change))
    assert code == 2 and expected in stderr and len(stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.tar"))


def test_a_label_outside_the_class_names_is_refused_with_the_image_named(image_shards, tmp_path):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"image\d+: label 9, but only 2 class names"):
        open_source([image_shards], "train", tmp_path / "two.txt")


def test_an_image_without_a_label_and_a_damaged_shard_are_refused(shipped_images, tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        data = encoded(shipped_images[0][0])
        member = tarfile.TarInfo("x.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=r"train-0\.tar, x: cls is None"):
        open_source([tmp_path], "train")
    (tmp_path / "train-0.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"train-0\.tar: damaged"):
        open_source([tmp_path / "train-0.tar"], "train")


def test_sources_read_any_range_of_items_without_reading_the_others(image_shards, shipped_images):
    items = open_source([image_shards], "train").items
    for chosen in (items[50:55], items[20:30], [items[40], items[3]]):
        read = list(read_images(chosen))
        assert [item for item, _ in read] == chosen
        for item, data in read:
            row = int(item.key.split("image")[1])
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), shipped_images[0][row])
