"""Images become shards of codes: the same bytes for any number of processes and interruptions, with nothing missing."""

import hashlib
import io
import json
import logging
import os
import re
import runpy
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

import image_sets
from image_sets import encoded, save_tiny_tokenizer
from npp_ds.data.manifest import Manifest
from npp_ds.data.shards import read_shard, verify
from npp_ds.data.store import stage
from npp_ds.distributed.environment import ProcessInfo, read_environment
from npp_ds.errors import UserError
from npp_ds.tokenizer import VQ16, VQConfig, VQModel, load_tokenizer, to_input
from npp_ds.tokenizer.batches import bytes_per_crop
from npp_ds.tokenizer.contents import estimate
from npp_ds.tokenizer.encode import EncodeSettings, Encoding
from npp_ds.tokenizer.images import decoded_images
from npp_ds.tokenizer.sources import open_source
from shard_sets import manifest_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data_prep" / "tokenize_imagenet.py"
SHIPPED = ROOT / "data_prep" / "fashion_mnist"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny.safetensors")


@pytest.fixture(scope="module")
def shipped_images():
    return image_sets.shipped_images(60)


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
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        return runpy.run_path(str(SCRIPT))["main"](), capsys.readouterr().err

    return run


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


def test_stock_webdataset_and_the_staged_store_give_the_same_codes_and_labels(codes, tmp_path):
    store = stage(codes, tmp_path)
    paths = [str(path) for path in sorted(codes.glob("*.tar"))]
    stock = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert len(stock) == len(store) == 60
    for row, sample in enumerate(stock):
        np.testing.assert_array_equal(sample["codes.npy"], store.codes[row])
        assert sample["codes.npy"].dtype == np.uint16 and sample["cls"] == store.labels[row]


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_interrupted_run_resumes_to_the_same_bytes(world_size, codes, image_shards, tokenizer_file, tmp_path):
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
    assert code == 2 and "crops.scheme: found 'center-flip', requested 'center'" in stderr
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


def test_the_batch_size_fits_the_free_memory_and_a_set_keeps_its_own(
    image_shards, tokenizer_file, tmp_path, monkeypatch, command
):
    config = load_tokenizer(tokenizer_file).config
    assert bytes_per_crop(VQ16, 256, "fp32") == 2 * bytes_per_crop(VQ16, 256, "bf16") == 7 * 128 * 256 * 256 * 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for crops, expected in ((13, 8), (0.1, 1), (1e6, 256)):
        free = int(2 * 2 * crops * bytes_per_crop(config, 32, "fp32"))
        monkeypatch.setattr("npp_ds.tokenizer.batches.free_memory", lambda device, free=free: free)
        job = encoding(image_shards, tmp_path / "new", tokenizer_file, crop_batch_size=None)
        assert job.settings.crop_batch_size == job.identity["source"]["crops_per_batch"] == expected
    first, second = (encoding(image_shards, tmp_path / "out", tokenizer_file, crop_batch_size=n) for n in (10, None))
    first.run()
    assert second.run() == 0 and second.finish().source["crops_per_batch"] == 10  # also if `first` began in between

    def encode(self, images, precision):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore.")

    monkeypatch.setattr(VQModel, "encode", encode)
    code, stderr = command(*arguments(image_shards, tmp_path / "full", tokenizer_file))
    assert (code, len(stderr.splitlines())) == (2, 1)
    assert "; cpu encodes 10 crops of 32 pixels at once; lower --batch-size" in stderr


@pytest.fixture
def mixed_folder(shipped_images, tmp_path):
    """Five readable images of several formats and three unreadable ones."""
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
    cut = mixed_folder / "a/cut.jpg"
    cut.write_bytes((mixed_folder / "a/grey.jpg").read_bytes().ljust(cut.stat().st_size, b"\0"))
    assert command(*line, "--max-skipped", "0.3")[0] == 0, "its images were tried again"
    assert Manifest.load(tmp_path / "out").num_samples == 6


def srun_task(rank: int, local_rank: int, tasks: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank), "SLURM_STEP_NUM_TASKS": str(tasks)}


@pytest.mark.parametrize(
    "environment, place, workers",
    [
        ({}, (0, 0, 1), 6),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, (3, 1, 4), 3),
        (
            {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16", "SLURM_CPUS_PER_TASK": "4"},
            (9, 1, 16),
            4,
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "8"},
            (0, 0, 1),
            6,
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "64"},
            (0, 0, 1),
            16,
        ),
    ],
)
def test_a_process_learns_its_place_from_launchers_and_slurm(environment, place, workers, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name.endswith(("RANK", "WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    assert read_environment() == ProcessInfo(*place)
    assert runpy.run_path(str(SCRIPT))["default_workers"]() == workers


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


@pytest.mark.parametrize(
    "change, named",
    [
        ({"samples-per-shard": 20}, "source.samples_per_shard: found 16, requested 20"),
        ({"batch-size": 20}, "source.crops_per_batch: found 10, requested 20"),
        ({"precision": "bf16"}, "tokenizer.precision: found 'fp32', requested 'bf16'"),
        ({"image-size": 36}, "grid_size: found 8, requested 9; image_size: found 32, requested 36"),
        ({"tokenizer": None}, "tokenizer.sha256: found '"),
        ({"class-list": None}, "class_names: found 10 entries, number 3 on: ['Dress', 'Coat', 'Sandal'], requested"),
    ],
)
def test_each_setting_that_changes_the_set_is_named_when_it_differs(
    change, named, codes, image_shards, tokenizer_file, tmp_path, command
):
    shutil.copytree(codes, tmp_path / "out")
    if "tokenizer" in change:
        change = {"tokenizer": save_tiny_tokenizer(tmp_path / "tiny.safetensors", seed=1)}
    if "class-list" in change:
        names = Manifest.load(codes).class_names
        change = {"class-list": tmp_path / "names.txt"}
        (tmp_path / "names.txt").write_text("\n".join([*names[:3], "gown", *names[4:]]))
    code, stderr = command(*arguments(image_shards, tmp_path / "out", tokenizer_file, **change))
    assert code == 2 and named in stderr and len(stderr.splitlines()) == 1
    assert digests(tmp_path / "out") == digests(codes)


def test_a_manifest_of_an_earlier_version_keeps_its_fingerprint_and_its_shards(
    codes, image_shards, tokenizer_file, tmp_path
):
    shutil.copytree(codes, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["source"]["bytes"], manifest["source"]["crops_per_batch"]
    assert "agreement" not in manifest["tokenizer"]
    path.write_text(json.dumps(manifest))
    job = encoding(image_shards, tmp_path / "out", tokenizer_file)
    assert job.run() == 0 and job.finish().num_samples == 60
    assert json.loads(path.read_text()) == manifest
    # Computed before there was an `agreement`: checkpoints of runs hold such fingerprints.
    assert manifest_of([]).fingerprint() == "ff91be83a7763262fab5c1e6c152d7ad14febbc1dddc6ffcd85a1cd2bebfa6b8"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_another_precision_states_its_agreement_with_fp32(
    precision, codes, image_shards, tokenizer_file, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "npp_ds")
    job = encoding(image_shards, tmp_path, tokenizer_file, precision=precision)
    job.run()
    tokenizer = job.finish().tokenizer
    stored, exact = (next(iter(read_shard(folder / "train-000000.tar")))[1] for folder in (tmp_path, codes))
    assert tokenizer.precision == precision and verify(tmp_path) == []
    assert (tokenizer.agreement.images, tokenizer.agreement.codes) == (5, 5 * 2 * 64)
    assert 0.5 < tokenizer.agreement.equal / tokenizer.agreement.codes < 1
    first = [codes for path in (tmp_path, codes) for _, codes, _ in list(read_shard(path / "train-000000.tar"))[:5]]
    assert tokenizer.agreement.equal == sum((a == b).sum() for a, b in zip(first[:5], first[5:], strict=True))
    assert "% of 640 codes of the first 5 images are those of fp32" in caplog.messages[0]
    assert stored.shape == exact.shape


def test_a_tokenizer_that_gives_no_finite_numbers_or_too_many_codes_is_refused(image_shards, tokenizer_file, tmp_path):
    broken = load_tokenizer(tokenizer_file)
    broken.encoder.conv_in.weight.fill_(float("nan"))
    source = open_source([image_shards], "train")
    settings = EncodeSettings("train", 32, samples_per_shard=16)
    with pytest.raises(UserError, match=r"no finite numbers for .*image0"):
        Encoding(source, broken, tmp_path, settings).run()
    assert not list(tmp_path.glob("*.tar"))
    large = VQModel(VQConfig(8, (1,), 1, 8, codebook_size=65537, codebook_dim=2, norm_groups=4))
    with pytest.raises(UserError, match="65537 codes"):
        Encoding(source, large, tmp_path / "other", settings)


def test_a_dry_run_estimates_shards_and_bytes_and_writes_nothing(
    codes, image_shards, tokenizer_file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "deep" / "out"
    size = sum(shard.bytes for shard in Manifest.load(codes).shards)
    first, second = estimate(encoding(image_shards, out, tokenizer_file), processes=2, seconds=0.1).splitlines()
    assert first.startswith(f"60 images x 2 crops x 64 codes: 4 shards (0 finished) of {size:,} bytes in all")
    rate, crops_rate, hours = map(float, re.match(r"(\S+) images/s, (\S+) crops/s .*; (\S+) hours", second).groups())
    assert rate > 1 and crops_rate == pytest.approx(2 * rate, rel=0.01)
    assert hours == pytest.approx(60 / rate / 2 / 3600, rel=0.01)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments(image_shards, out, tokenizer_file), "--dry-run"])
    assert runpy.run_path(str(SCRIPT))["main"]() == 0
    printed = capsys.readouterr().out
    assert f"{size:,} bytes in all" in printed and "60 images x 2 crops" in printed
    assert not (tmp_path / "deep").exists()
    assert "4 shards (4 finished)" in estimate(encoding(image_shards, codes, tokenizer_file), 1, 0.1)


def test_progress_and_summary_report_rates_shards_skipped_and_compression(
    image_shards, tokenizer_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("npp_ds.utils.screen.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments(image_shards, tmp_path / "out", tokenizer_file)])
    assert runpy.run_path(str(SCRIPT))["main"]() == 0
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    facts = r"2 crops each, 3/4 shards, 0 skipped, 0\.0 s left"
    assert re.fullmatch(rf"tokenizing: 60/60 images, [\d.e+]+ images/s, {facts}", last), last
    images = sum(item.size for item in open_source([image_shards], "train").items)
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert f"60 images x 2 crops x 64 codes in 4 shards, {stored / 1e3:,.1f} kB" in out
    assert f"{max(images, stored) / min(images, stored):.1f} times" in out and "0 images skipped" in out


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


def test_a_shard_of_nothing_but_unreadable_images_is_empty_and_sound(tokenizer_file, tmp_path):
    files = {f"a/{row:02d}.png": b"" for row in range(4)} | {"b/x.png": encoded(np.zeros((9, 9), bool))}
    image_sets.write_tree(tmp_path, files)
    job = encoding(tmp_path, tmp_path / "out", tokenizer_file, samples_per_shard=2, max_skipped=1)
    job.run()
    manifest = job.finish()
    assert [shard.samples for shard in manifest.shards] == [0, 0, 1] and len(manifest.skipped) == 4
    assert verify(tmp_path / "out") == []


def test_sources_read_any_range_of_items_without_reading_the_others(image_shards, shipped_images):
    items = open_source([image_shards], "train").items
    for chosen in (items[50:55], items[20:30], [items[40], items[3]]):
        read = list(decoded_images(chosen))
        assert [item for item, _ in read] == chosen
        for item, image in read:
            row = int(item.key.split("image")[1])
            assert np.array_equal(np.asarray(image), shipped_images[0][row])
