"""`npp evaluate`: images of every kind against references of every kind, and the content of results."""

import hashlib
import io
import json
import os
import re
import shlex
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from extractors import Projection, random_images
from npp_ds.cli import app
from npp_ds.errors import UserError
from npp_ds.evaluation.evaluate import (
    check_reference,
    describe,
    evaluate_images,
    load_extractor,
    load_reference,
    make_reference,
    open_extractor,
    recorded_extractor,
    write_result,
)
from npp_ds.evaluation.extractors import ClassifierExtractor, Features, measure
from npp_ds.evaluation.images import open_images, shard_paths
from npp_ds.sampling.folder import newest_record, newest_samples, write_pngs, write_samples
from npp_ds.tokenizer.sources import load_images, open_source
from npp_ds.utils.files import write_json_atomic
from npp_ds.utils.format import utc_now
from shard_sets import files_limited_to

SHIPPED_IMAGES = Path(__file__).parents[2] / "data_prep/fashion_mnist"


def write_shard(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            for suffix, data in (("png", png.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def pixels(source, image_size=None) -> np.ndarray:
    return np.concatenate(list(open_images(source, image_size).batches(16)))


@pytest.fixture
def images() -> np.ndarray:
    """40 dark images, then 40 bright ones."""
    return np.concatenate([random_images(40, 5), random_images(40, 4, low=100)])


@pytest.fixture
def shards(images, tmp_path) -> str:
    """Their pattern: the images in two image shards, dark ones of class 0, bright ones of class 1."""
    labels = np.repeat([0, 1], 40)
    for part, rows in enumerate((slice(0, 50), slice(50, 80))):
        write_shard(tmp_path / f"train-{part:06d}.tar.gz", images[rows], labels[rows])
    return str(tmp_path / "train-*.tar.gz")


def test_images_come_in_the_same_order_from_samples_npz_shards_and_folders(images, shards, tmp_path):
    write_samples(tmp_path / "samples", images, np.arange(80), {"seed": 3})
    np.savez_compressed(tmp_path / "images.npz", arr_0=images)
    for i, image in enumerate(images):
        folder = tmp_path / "folder" / f"{i // 30}" / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03d}{('.png', '.PNG', '.webp')[i % 3]}", lossless=True)
    (tmp_path / "folder/notes.txt").write_text("no image")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for source, kind in (("samples", "samples"), ("images.npz", "npz"), ("folder", "folder"), ("link", "folder")):
        found = open_images(tmp_path / source)
        assert (found.kind, found.count) == (kind, 80)
        batches = list(found.batches(16))
        assert [len(batch) for batch in batches] == [16] * 5 and all(b.dtype == np.uint8 for b in batches)
        np.testing.assert_array_equal(np.concatenate(batches), images)
    np.testing.assert_array_equal(pixels(shards), images)
    np.testing.assert_array_equal(open_images(shards).labels, np.repeat([0, 1], 40))
    assert open_images(tmp_path / "samples").record["seed"] == 3


def test_images_of_several_sizes_are_refused_by_name_unless_cropped(tmp_path):
    for name, size in (("a", (16, 8)), ("b", (8, 24))):
        Image.new("L", size, 77).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"b\.png: 8x24 pixels, expected 16x8 .* --image-size"):
        pixels(tmp_path)
    assert (pixels(tmp_path, 8) == 77).all() and pixels(tmp_path, 8).shape == (2, 8, 8, 3)


def test_what_holds_no_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", arr_1=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "whole.npz", arr_0=random_images(64, 0))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:5000])
    for name, text in (
        ("missing", "no images found; expected a folder that `npp sample` wrote"),
        ("val-*.tar", "no images found"),
        ("empty", "no images found; expected .*jpg, .*png"),
        ("text.npz", "no .npz file with images under 'arr_0'"),
        ("other.npz", "no .npz file with images under 'arr_0'"),
        ("float.npz", r"arr_0 is float64 \[2, 4, 4, 3\], expected uint8"),
        ("cut.npz", "no .npz file with images under 'arr_0'"),
    ):
        with pytest.raises(UserError, match=text):
            list(open_images(tmp_path / name).batches(16))
    with pytest.raises(UserError, match="no images found"):
        shard_paths(tmp_path / "text.npz")


def test_one_pass_keeps_evenly_spaced_features_and_hashes_the_pixels(images, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=images)
    extractor, steps = Projection(), []
    found = measure(open_images(tmp_path / "images.npz"), extractor, 9, lambda *step: steps.append(step))
    assert found.count == extractor.seen == 80 and found.image_size == [8, 8]
    assert found.sha256 == hashlib.sha256(images.tobytes()).hexdigest()
    rows = [0, 10, 20, 30, 40, 49, 59, 69, 79]
    expected = np.concatenate([extractor(images[i : i + 1]).pool for i in rows])
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)
    assert steps == [(n, 80) for n in (16, 32, 48, 64, 80)]


class Wordy(Projection):
    """Predicts 4000 classes: image i of a set shows class i."""

    def __call__(self, images):
        first, found = self.seen, super().__call__(images)
        return Features(found.pool, None, (np.arange(4000) == np.arange(first, self.seen)[:, None]).astype(np.float32))


def test_of_a_reference_no_probabilities_are_held_only_which_class_each_image_shows(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=random_images(2000, 0))
    peaks = []
    for keep in (100, None):
        tracemalloc.start()
        found = measure(open_images(tmp_path / "images.npz"), Wordy(), keep)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        np.testing.assert_array_equal(found.predicted, np.arange(2000))
        assert (found.probabilities is None) == (keep is not None)
    assert peaks[0] < 2000 * 4000 * 4 / 4 < peaks[1]


def test_samples_npz_stands_for_its_folder_with_the_record(images, tmp_path):
    write_samples(tmp_path / "samples", images, np.repeat([0, 1], 40), {"seed": 3})
    found = open_images(tmp_path / "samples/samples.npz")
    assert found.record["seed"] == 3 and found.labels.tolist() == [0] * 40 + [1] * 40
    assert found.path == str(tmp_path / "samples")
    (tmp_path / "samples/samples.json").rename(tmp_path / "record.json")
    assert open_images(tmp_path / "samples/samples.npz").record == {}


def test_samples_that_are_not_finished_are_refused(images, tmp_path):
    write_samples(tmp_path / "a", images, np.arange(80), {})
    write_pngs(tmp_path / "a", images[:3], range(3))
    (tmp_path / "a/.unfinished").mkdir()
    assert open_images(tmp_path / "a").count == 80, "with its record it is finished"
    (tmp_path / "a/samples.json").unlink()
    for name in ("a", "a/images", "a/samples.npz"):
        with pytest.raises(UserError, match="a: these samples are not finished; rerun the same `npp sample`"):
            open_images(tmp_path / name)
    (tmp_path / "a/.unfinished").rmdir()
    with pytest.raises(UserError, match="not finished"):
        open_images(tmp_path / "a")
    (tmp_path / "a/samples.npz").unlink()
    assert open_images(tmp_path / "a/images").count == 3


def test_samples_equal_to_the_reference_are_at_distance_zero_and_agree_as_their_labels_do(images, shards, tmp_path):
    asked = np.repeat([0, 1, 0], [40, 30, 10])
    record = {"seed": 3, "cfg_scale": 1.5, "checkpoint_step": 12, "per_class": 40}
    write_samples(tmp_path / "samples", images, asked, record)
    extractor = Projection()
    reference = load_reference(shards, extractor)
    result = evaluate_images(open_images(tmp_path / "samples"), reference, extractor)
    assert result["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert result["spatial_frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (result["precision"], result["recall"]) == (1, 1)
    assert result["class_agreement"] == 70 / 80 and result["reference_class_agreement"] == 1
    assert result["class_agreement_by_class"] == {"0": 0.8, "1": 1.0}
    assert record.items() <= result["samples"].items() and result["num_images"] == result["num_reference_images"] == 80
    assert result["warnings"] == []
    path = write_result(result)
    saved = json.loads(path.read_text())
    assert path == tmp_path / "samples/evaluation.json" and saved.pop("finished_at") and saved == result
    assert write_result(result, tmp_path / "new/out.json") == tmp_path / "new/out.json"
    np.savez(tmp_path / "bright.npz", arr_0=images[40:])
    worse = evaluate_images(open_images(tmp_path / "bright.npz"), reference, extractor)
    assert worse["frechet_distance"] > 1 and worse["recall"] < 0.9
    assert "class_agreement" not in worse and worse["samples"] == {}


def test_statistics_made_once_give_the_result_of_the_images_themselves(images, shards, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=random_images(50, 9, low=30))
    extractor = Projection()
    made = make_reference(tmp_path / "reference.npz", shards, extractor)
    direct, stored = (
        evaluate_images(open_images(tmp_path / "samples.npz"), load_reference(path, extractor), extractor)
        for path in (shards, tmp_path / "reference.npz")
    )
    differing = {key for key in direct if direct[key] != stored[key]}
    assert differing == {"reference"}
    assert direct["reference"]["sha256"] == hashlib.sha256(images.tobytes()).hexdigest()
    assert stored["reference"]["sha256"] == hashlib.sha256((tmp_path / "reference.npz").read_bytes()).hexdigest()
    for key in ("images", "num_images", "image_size", "extractor", "extractor_sha256", "pixels_sha256"):
        assert direct["reference"][key] == stored["reference"][key] is not None
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as file:
        assert {"mu": (24,), "sigma": (24, 24), "mu_s": (5,), "sigma_s": (5, 5)}.items() <= {
            name: file[name].shape for name in file.files
        }.items()
        np.testing.assert_array_equal(file["mu"], made.pool[0])
    bare = load_reference(tmp_path / "reference.npz", extractor, with_features=False)
    assert bare.features is None and bare.source == made.source


def test_references_that_do_not_fit_are_refused(images, shards, tmp_path):
    extractor = Projection()
    make_reference(tmp_path / "made.npz", shards, extractor)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "half.npz", mu=np.zeros(2048))
    np.savez(tmp_path / "strange.npz", mu=np.zeros(24), sigma=np.eye(24), metadata=np.array("{}"))
    (tmp_path / "text.npz").write_text("text")
    assert recorded_extractor(tmp_path / "made.npz") == "projection"
    assert recorded_extractor(tmp_path / "adm.npz") == "inception"
    assert recorded_extractor(shards) is None
    with pytest.raises(UserError, match=r"adm\.npz: statistics of the extractor inception, but projection was"):
        load_reference(tmp_path / "adm.npz", extractor)
    extractor.name, extractor.feature_dim = "inception", 2048
    with pytest.raises(UserError, match=r"found mu \[2048\], sigma missing, expected \[2048\] and \[2048, 2048\]"):
        load_reference(tmp_path / "half.npz", extractor)
    with pytest.raises(UserError, match=r"strange\.npz: metadata is not what"):
        load_reference(tmp_path / "strange.npz", extractor)
    with pytest.raises(UserError, match=r"text\.npz: no readable \.npz"):
        load_reference(tmp_path / "text.npz", extractor)
    with pytest.raises(UserError, match="holds statistics already"):
        make_reference(tmp_path / "again.npz", tmp_path / "made.npz", extractor)
    with pytest.raises(UserError, match=r"out\.json: found \.json, expected"):
        make_reference(tmp_path / "out.json", shards, extractor)
    with pytest.raises(UserError, match="'vgg', expected inception or fashion_mnist"):
        load_extractor("vgg")


def test_a_reference_is_checked_without_being_measured(shards, tmp_path, monkeypatch):
    extractor = Projection()
    make_reference(tmp_path / "made.npz", shards, extractor)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    monkeypatch.setattr("npp_ds.evaluation.evaluate.measure", None)
    check_reference(shards, extractor)
    check_reference(tmp_path / "made.npz", extractor)
    with pytest.raises(UserError, match=r"adm\.npz: statistics of the extractor inception, but projection was"):
        check_reference(tmp_path / "adm.npz", extractor)
    with pytest.raises(UserError, match="nowhere"):
        check_reference(tmp_path / "nowhere", extractor)


def test_each_reason_why_results_are_not_comparable_is_reported_once(images, tmp_path):
    extractor = Projection()
    (tmp_path / "imagenet_val").mkdir()
    np.savez(tmp_path / "imagenet_val/images.npz", arr_0=random_images(30, 1, size=8))
    make_reference(tmp_path / "ref.npz", tmp_path / "imagenet_val/images.npz", extractor)
    extractor.sha256 = "1" * 64
    copies = np.concatenate([images[:18], images[:2]])
    write_samples(tmp_path / "samples", copies, np.zeros(20), {})
    reference = load_reference(tmp_path / "ref.npz", extractor)
    reference.source.image_size[:] = [9, 8]

    np.savez(tmp_path / "copies.npz", arr_0=copies)
    of_others = evaluate_images(open_images(tmp_path / "copies.npz"), reference, extractor)["warnings"]
    assert "2 of the samples are copies of others" in of_others, "whoever made them"

    def warnings() -> list[str]:
        return evaluate_images(open_images(tmp_path / "samples"), reference, extractor)["warnings"]

    always = [
        "20 samples are too few for 24 features",
        "samples are 8x8 pixels, the reference's images 8x9",
        "the reference was made with other weights of projection (SHA-256 00000000, here 11111111)",
        "2 of the samples are copies of others",
    ]
    found = warnings()
    assert len(found) == 4 and all(text.startswith(start) for text, start in zip(found, always, strict=True))
    extractor.name, extractor.standard = "inception", False
    published = [
        "Inception's weights are not the standard ones (SHA-256 11111111)",
        "20 samples, published figures are of 50,000",
        "the reference has only 30 images",
        "the reference seems to be of validation images",
    ]
    found = warnings()[4:]
    assert len(found) == 4 and all(text.startswith(start) for text, start in zip(found, published, strict=True))


@pytest.mark.parametrize("form, lossy", [("JPEG", True), ("PNG", False)])
def test_samples_in_a_lossy_format_are_reported_whatever_their_names(form, lossy, images, tmp_path):
    (tmp_path / "samples").mkdir()
    for number, image in enumerate(images[:30]):
        Image.fromarray(image).save(tmp_path / f"samples/{number}.png", form)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    reference = load_reference(tmp_path / "reference.npz", Projection())
    found = evaluate_images(open_images(tmp_path / "samples"), reference, Projection())["warnings"]
    assert found == ["samples were read from JPEG files, which can lose detail: save samples as PNG or .npz"] * lossy


@pytest.mark.parametrize(
    "name", ["VIRTUAL_imagenet256_labeled.npz", "evaluation.npz", "festival.npz", "valley/train.npz"]
)
def test_names_that_only_contain_val_are_no_validation_images(name, images, tmp_path):
    extractor = Projection()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    np.savez(tmp_path / name, arr_0=images)
    reference = load_reference(tmp_path / name, extractor)
    extractor.name = "inception"
    found = evaluate_images(open_images(tmp_path / name), reference, extractor)["warnings"]
    assert len(found) == 2 and not any("validation" in text for text in found)


def test_the_extractor_is_that_of_the_reference_else_of_the_samples_tokenizer(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("npp_ds.evaluation.evaluate.load_extractor", lambda name, weights: name)
    make_reference(tmp_path / "made.npz", shards, Projection())
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3))
    for reference, tokenizer, expected in (
        (tmp_path / "made.npz", "fashion_mnist", "projection"),
        (tmp_path / "adm.npz", "fashion_mnist", "inception"),
        (shards, "fashion_mnist", "fashion_mnist"),
        (shards, "vq_ds16_c2i.pt", "inception"),
        (shards, None, "inception"),
    ):
        assert open_extractor("auto", reference, tokenizer, None) == expected
        assert open_extractor("other", reference, tokenizer, None) == "other"


@pytest.fixture(scope="module")
def real():
    return load_images(open_source([SHIPPED_IMAGES], "val"), 32)


def test_the_shipped_classifier_prefers_real_images_to_darkened_ones(real, tmp_path):
    images, labels = real
    extractor = ClassifierExtractor()
    write_shard(tmp_path / "real-000000.tar.gz", images[400:], labels[400:])
    reference = load_reference(tmp_path / "real-000000.tar.gz", extractor)
    assert reference.source.class_agreement > 0.8

    def evaluated(name: str, shown: np.ndarray, asked: np.ndarray) -> dict:
        write_samples(tmp_path / name, shown, asked, {})
        return evaluate_images(open_images(tmp_path / name), reference, extractor)

    good = evaluated("good", images[:400], labels[:400])
    spoilt = evaluated("spoilt", images[:400] // 2, labels[:400])
    assert good["class_agreement"] > 0.8 and good["inception_score"] > 4
    assert spoilt["frechet_distance"] > 1.5 * good["frechet_distance"]
    assert evaluated("mistaken", images[:400], (labels[:400] + 1) % 10)["class_agreement"] < 0.15


def test_the_newest_samples_are_those_of_the_latest_record_whatever_the_times_of_the_files(images, tmp_path):
    folders = [tmp_path / "run/samples" / name for name in ("c", "b", "a")]
    for folder in folders:
        write_samples(folder, images[:2], np.arange(2), {"checkpoint_step": 5, "finished_at": utc_now()})
        time.sleep(0.002)
        write_json_atomic(folder / "evaluation.json", {"finished_at": utc_now()})
    for age, folder in enumerate(reversed(folders)):
        for file in folder.iterdir():
            os.utime(file, (1e9 + age, 1e9 + age))
    assert newest_samples(tmp_path / "run") == folders[-1]
    assert newest_record(tmp_path / "run/samples", "evaluation.json").parent == folders[-1]
    for step, folder in enumerate(folders):  # as an earlier version wrote them
        record = {"checkpoint_step": 10 - step}
        write_json_atomic(folder / "samples.json", record)
        write_json_atomic(folder / "evaluation.json", {"samples": record})
    assert newest_samples(tmp_path / "run") == folders[0]
    assert newest_record(tmp_path / "run/samples", "evaluation.json").parent == folders[0]
    (folders[1] / "samples.json").write_text("[")
    assert newest_samples(tmp_path / "run") == folders[0]
    with pytest.raises(UserError, match="typo: not found; expected a run folder"):
        newest_samples(tmp_path / "typo")


def test_the_command_evaluates_the_newest_samples_of_a_run_and_makes_references(real, tmp_path):
    images, labels = real
    record = {"tokenizer": {"name": "fashion_mnist"}, "seed": 5}
    write_samples(tmp_path / "run/samples/a", images[:100], labels[:100], record)
    write_shard(tmp_path / "val-000000.tar.gz", images[100:], labels[100:])

    def npp(*arguments) -> str:
        done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    shards, made = tmp_path / "val-000000.tar.gz", tmp_path / "made.npz"
    out = npp(tmp_path / "run", "--reference", shards)
    result = json.loads((tmp_path / "run/samples/a/evaluation.json").read_text())
    assert re.search(rf"Frechet distance +{result['frechet_distance']:.2f}\n", out) and "warning" not in out
    assert result["extractor"] == "fashion_mnist" and result["samples"]["seed"] == 5
    assert describe(result) in out
    out = npp("--make-reference", made, "--reference", shards, "--extractor", "fashion_mnist")
    assert "900 images" in out
    npp("--samples", tmp_path / "run/samples/a/samples.npz", "--reference", made, "--out", tmp_path / "b.json")
    again = json.loads((tmp_path / "b.json").read_text())
    for key in ("frechet_distance", "inception_score", "precision", "recall"):
        assert again[key] == result[key]
    with pytest.raises(UserError, match="give a run folder, --samples, or --make-reference"):
        npp("--reference", made)
    with pytest.raises(UserError, match="--step, --weights: expected only with --sweep"):
        npp(tmp_path / "run", "--reference", made, "--weights", "ema", "--step", "5")
    with pytest.raises(UserError, match="--cfg-scale: --sweep cfg=1,2 varies it"):
        npp(tmp_path / "run", "--reference", made, "--sweep", "cfg=1,2", "--cfg-scale", "0")


def test_an_unwritable_result_is_reported_before_measuring(images, tmp_path, monkeypatch):
    np.savez(tmp_path / "images.npz", arr_0=images)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("npp_ds.evaluation.evaluate.load_extractor", lambda name, weights: Projection())
    (tmp_path / "folder.npz").mkdir()
    measured = []
    monkeypatch.setattr(Projection, "__call__", lambda *_: measured.append(1))
    images_of = ["--reference", tmp_path / "images.npz"]
    for target, text in (("file/ref.npz", "Not a directory|File exists"), ("folder.npz", "is a folder")):
        out = tmp_path / target
        for command in (["--make-reference", out], ["--samples", tmp_path / "images.npz", "--out", out]):
            with pytest.raises(UserError, match=f"{target.split('/')[0]}.*({text})"):
                CliRunner().invoke(app, ["evaluate", *map(str, images_of + command)], catch_exceptions=False)
    assert not measured
    monkeypatch.undo()
    made = make_reference(tmp_path / "new/folder/ref.npz", tmp_path / "images.npz", Projection())
    with (
        files_limited_to(1000),
        pytest.raises(UserError, match=r"ref\.npz: .*too large; free some space, or name"),
    ):
        make_reference(tmp_path / "new/folder/ref.npz", tmp_path / "images.npz", Projection())
    assert load_reference(tmp_path / "new/folder/ref.npz", Projection()).source == made.source, "the old one stays"


def test_the_commands_of_the_guide_name_options_that_exist():
    guide = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^ *((?:npp|accelerate) .*)$", guide, re.MULTILINE)]
    assert len(commands) == 6
    for words in commands:
        _, command, *arguments = words[words.index("npp_ds") if "npp_ds" in words else 0 :]
        get_command(app).commands[command].make_context(command, arguments)


def test_missing_weights_stop_the_command_before_any_image_is_read(tmp_path, monkeypatch):
    np.savez(tmp_path / "samples.npz", arr_0=random_images(4, 0))
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    monkeypatch.setattr("npp_ds.evaluation.evaluate.measure", None)
    arguments = ["--samples", "samples.npz", "--reference", "adm.npz", "--inception-weights", "absent.pth"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"absent\.pth: not found; expected weights-inception-2015-12-05-6726825d"):
        CliRunner().invoke(app, ["evaluate", *arguments], catch_exceptions=False)
