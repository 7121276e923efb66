"""Sampling: labels, independence of batching, pixels by the published rule, the folder of samples, refusals."""

import csv
import io
import json
import tracemalloc
import weakref
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from image_sets import save_tiny_tokenizer
from npp_ds.checkpoint.export import export_weights
from npp_ds.checkpoint.open import open_weights
from npp_ds.data.manifest import TokenizerInfo
from npp_ds.errors import UserError
from npp_ds.model.patches import group
from npp_ds.sampling import folder as sample_folder
from npp_ds.sampling import job as job_module
from npp_ds.sampling.folder import load_samples, map_array, repeated_images, sample_grid, write_samples
from npp_ds.sampling.image_model import find_tokenizer, parse_classes, split_classes, stage_warning
from npp_ds.sampling.job import Request, Sampling, default_folder, image_count
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import build_model, labels_of, resize, sample_images, worth_capturing
from npp_ds.tokenizer import loading, vq
from npp_ds.utils.files import sha256
from sample_sets import tiny_model, tiny_run
from shard_sets import files_limited_to, manifest_of


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="module")
def weights(run_dir):
    return open_weights(run_dir)


@pytest.fixture(scope="module")
def tokenizer(weights):
    return find_tokenizer(weights)


def twelve(**changes) -> Request:
    return Request(**{"classes": [0, 1, 2], "count": 12, "part_size": 5, **changes})


def draw(weights, tokenizer, request, out, **keys) -> dict:
    job = Sampling(weights, tokenizer, request, out, **keys)
    job.run()
    return job.finish()


def test_balanced_labels_are_exactly_balanced_and_grow_without_changing():
    few, many = (labels_of(np.arange(n), [7, 2, 5], "balanced", 0) for n in (30, 150))
    assert {c: int((many == c).sum()) for c in (2, 5, 7)} == {2: 50, 5: 50, 7: 50}
    np.testing.assert_array_equal(few, many[:30])
    imagenet = labels_of(np.arange(50_000), range(1000), "balanced", 0)
    assert (np.bincount(imagenet) == 50).all() and len(np.bincount(imagenet)) == 1000


def test_random_labels_are_uniform_and_depend_on_seed_and_index_only():
    indices = np.arange(30_000)
    labels = labels_of(indices, list(range(10)), "random", 4)
    counts = np.bincount(labels, minlength=10)
    assert ((counts - 3000) ** 2 / 3000).sum() < 30
    np.testing.assert_array_equal(labels_of(indices[[5, 29_999]], list(range(10)), "random", 4), labels[[5, 29_999]])
    assert (labels_of(indices, list(range(10)), "random", 5) == labels).mean() < 0.2


def test_classes_are_numbers_or_names_and_unknown_ones_are_all_named():
    names = ["cat", "dog", "3"]
    assert parse_classes(["dog", "0", 2], 3, names) == [1, 0, 2]
    assert parse_classes(None, 3, names) == [0, 1, 2]
    assert parse_classes([2, "2"], 3, ["0", "2", "10"]) == [2, 1], "a number is never a name"
    with pytest.raises(UserError, match=r"found cow, 7, expected numbers 0\.\.2 or one of cat, dog"):
        parse_classes(["dog", "cow", 7], 3, names)
    with pytest.raises(UserError, match=r"expected numbers 0\.\.2; the names of the classes are not known"):
        parse_classes(["dog"], 3, [])


def test_names_of_several_classes_are_refused_and_names_with_commas_stay_whole():
    names = ["tench, Tinca tinca", "crane", "dog", "crane", "dog, small,wild", "Tinca tinca"]
    with pytest.raises(UserError, match="crane is the name of 1 and 3; give the number of the one you mean"):
        parse_classes(["dog", "crane"], 6, names)
    assert parse_classes(["3", "dog"], 6, names) == [3, 2]
    texts = {
        "tench, Tinca tinca": [0], "tench,Tinca tinca,2": [0, 2], "dog,3,dog, small, wild": [2, 3, 4],
        "Tinca tinca, dog": [5, 2],
    }  # fmt: skip
    for text, expected in texts.items():
        assert parse_classes(split_classes(text, names), 6, names) == expected
    assert split_classes("207, 360", []) == ["207", "360"]


def test_class_names_are_found_in_any_case_and_near_ones_are_suggested():
    names = ["Sneaker", "Bag", "Ankle boot, High", "bag"]
    assert parse_classes(split_classes("sneaker,ANKLE boot,high,Bag,bag", names), 4, names) == [0, 2, 1, 3]
    with pytest.raises(UserError, match="BAG is the name of 1 and 3; give the number"):
        parse_classes(["BAG"], 4, names)
    with pytest.raises(UserError, match=r"found sneekers, 9, did you mean Sneaker\? expected numbers 0..3 or one"):
        parse_classes(["sneekers", "9"], 4, names)


def test_pixels_are_truncated_by_the_published_rule_after_resizing():
    model_output = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.0039, 0.00392, 0.5, 0.9999, 1.0, 3.0])
    images = model_output.view(1, 1, 1, -1).expand(1, 3, 1, -1)
    expected = [0, 0, 64, 128, 128, 128, 191, 255, 255, 255]
    assert vq.to_uint8(images)[0, 0, :, 0].tolist() == expected
    ramp = torch.linspace(-1, 1, 8).view(1, 1, 1, 8).expand(1, 3, 8, 8)
    published = torch.nn.functional.interpolate(ramp, size=(12, 12), mode="bicubic")
    assert torch.equal(resize(ramp, 12), published)
    assert resize(ramp, 8) is ramp and resize(ramp, None) is ramp


def test_an_image_is_the_same_at_any_batch_size_and_in_any_subset(tokenizer):
    model = tiny_model()
    indices = np.arange(20)
    labels = labels_of(indices, [0, 1, 2], "balanced", 0)
    options = Options(seed=3, cfg_scale=1.5)
    whole = sample_images(model, tokenizer.decode, labels, indices, options, batch_size=20)
    assert whole.shape == (20, 16, 16, 3) and whole.dtype == np.uint8
    assert repeated_images(whole) == 0
    for rows, batch_size in ((indices, 3), (indices[7:], 5), (indices[::-3].copy(), 1)):
        part = sample_images(model, tokenizer.decode, labels[rows], rows, options, batch_size=batch_size)
        np.testing.assert_allclose(part.astype(int), whole[rows].astype(int), atol=1)
    other = sample_images(model, tokenizer.decode, labels, indices, replace(options, seed=4))
    assert (other != whole).any(axis=(1, 2, 3)).all()


def test_a_run_is_sampled_into_a_folder_that_can_be_read_back(weights, tokenizer, tmp_path):
    done = []
    request = twelve(options=Options(seed=2, cfg_scale=2.0), image_size=24)
    job = Sampling(weights, tokenizer, request, tmp_path, batch_size=3)
    assert job.run(progress=lambda count, total: done.append((count, total))) == 12
    assert done == [(n, 12) for n in (3, 5, 8, 10, 12)]
    record = job.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "samples.json", "samples.npz"]
    images, labels, again = load_samples(tmp_path)
    assert json.loads((tmp_path / "samples.json").read_text()) == again == record
    assert labels.tolist() == [0, 1, 2] * 4 and labels.dtype == np.int64
    whole = sample_images(
        tiny_model(), tokenizer.decode, labels, np.arange(12), request.options, batch_size=12, image_size=24
    )
    np.testing.assert_allclose(images.astype(int), whole.astype(int), atol=1)
    expected = {
        "run": "tiny", "source": str(weights.path), "checkpoint_step": 120, "weights": "raw",
        "weights_sha256": sha256(weights.path / "checkpoints/step-00000120/COMPLETE.json"),
        "seed": 2, "cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "patch_side": 1,
        "labels": "balanced", "classes": [0, 1, 2], "per_class": 4, "count": 12, "image_size": [24, 24],
        "dtype": "fp32", "batch_size": 3, "processes": 1, "repeated_images": 0,
        "tokenizer": {"name": "vq.safetensors", "sha256": sha256(weights.path / "vq.safetensors")},
    }  # fmt: skip
    assert expected.items() <= record.items()
    assert record["images_per_second"] > 0 and record["created_by"].startswith("npp_ds")
    assert Image.open(tmp_path / "grid.png").size[1] >= 3 * 64


def adm_batches(path: Path, batch_size: int):
    """The batches of `arr_0` as ADM's evaluator reads them (evaluations/evaluator.py of openai/guided-diffusion): a zip
    entry that it streams, behind the header of the .npy format (numpy.lib.format), without numpy's own reader."""
    with open(path, "rb") as file, zipfile.ZipFile(file, "r") as archive:
        assert "arr_0.npy" in archive.namelist()
        with archive.open("arr_0.npy", "r") as entry:
            assert entry.read(8) == b"\x93NUMPY\x01\x00"
            header = eval(entry.read(int.from_bytes(entry.read(2), "little")).decode("latin1"), {"__builtins__": {}})
            assert np.dtype(header["descr"]) == np.uint8 and header["fortran_order"] is False
            count, height, width, channels = header["shape"]
            for start in range(0, count, batch_size):
                size = min(batch_size, count - start) * height * width * channels
                data = entry.read(size)
                assert len(data) == size
                yield np.frombuffer(data, np.uint8).reshape(-1, height, width, channels)
            assert entry.read() == b""


def test_adms_evaluator_can_read_the_file_and_numpy_too(weights, tokenizer, tmp_path):
    draw(weights, tokenizer, twelve(), tmp_path)
    batches = list(adm_batches(tmp_path / "samples.npz", 5))
    assert [batch.shape for batch in batches] == [(5, 16, 16, 3), (5, 16, 16, 3), (2, 16, 16, 3)]
    images = load_samples(tmp_path)[0]
    np.testing.assert_array_equal(np.concatenate(batches), images)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "labels"]
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["labels"], [0, 1, 2] * 4)


def test_the_file_is_written_in_parts_and_mapped_for_reading(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 4, 6, 3), dtype=np.uint8), np.arange(7) % 2
    parts = (images[start : start + 3] for start in (0, 3, 6))
    write_samples(tmp_path / "parts", parts, labels, {"seed": 1})
    write_samples(tmp_path / "whole", images, labels, {"seed": 1})
    assert (tmp_path / "parts/samples.npz").read_bytes() == (tmp_path / "whole/samples.npz").read_bytes()
    read, read_labels, record = load_samples(tmp_path / "parts")
    assert isinstance(read, np.memmap) and record == {"seed": 1, "repeated_images": 0}
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(read_labels, labels)
    torch.from_numpy(read[0]).add_(1)
    np.testing.assert_array_equal(load_samples(tmp_path / "parts")[0], images)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "other.npz", arr_0=images, mu=labels)
        np.testing.assert_array_equal(map_array(tmp_path / "other.npz"), images)
        np.testing.assert_array_equal(map_array(tmp_path / "other.npz", "mu"), labels)
    (tmp_path / "parts/samples.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="no finished samples"):
        load_samples(tmp_path / "parts")


def test_no_more_than_a_part_is_held_in_memory(tmp_path):
    size, count = 50 * 64 * 64 * 3, 60
    parts = (np.full((50, 64, 64, 3), number, np.uint8) for number in range(count))
    tracemalloc.start()
    write_samples(tmp_path, parts, np.arange(50 * count) % 4, {})
    images, _, record = load_samples(tmp_path)
    total = sum(int(image[0, 0, 0]) for image in images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 50 * sum(range(count)) and record["repeated_images"] == 49 * count
    assert peak < 5 * size


def test_given_classes_a_coarse_side_and_given_weights_are_used(weights, tokenizer, tmp_path, monkeypatch):
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda codes: decoded.append(codes) or decode(codes))
    request = Request(classes=[2], count=6, options=Options(patch_side=2, seed=9))
    other = open_weights(tiny_run(tmp_path / "other", seed=1))
    record = draw(other, tokenizer, request, tmp_path / "looked")
    assert load_samples(tmp_path / "looked")[1].tolist() == [2] * 6
    assert record["weights_sha256"] == other.sha256 != weights.sha256
    (codes,) = decoded
    patches = group(codes, 2)
    assert (patches == patches[..., :1]).all()
    assert len(patches[..., 0].unique()) > 4
    draw(weights, tokenizer, request, tmp_path / "usual")
    assert (load_samples(tmp_path / "usual")[0] != load_samples(tmp_path / "looked")[0]).any()


def test_a_model_of_a_coarse_stage_is_distinguished_from_a_finished_one(tmp_path):
    coarse = open_weights(tiny_run(tmp_path / "coarse", stage=0))
    assert coarse.patch_side == 2
    assert "from a stage of patch side 2 and are sampled at 1; sample them with --patch-side 2" in stage_warning(
        coarse, Options()
    )
    assert stage_warning(coarse, Options(patch_side=2)) is None
    assert stage_warning(open_weights(tiny_run(tmp_path / "fine", stage=1)), Options()) is None
    assert stage_warning(replace(coarse, patch_side=None), Options()) is None
    export_weights(coarse, tmp_path / "coarse.safetensors")
    assert open_weights(tmp_path / "coarse.safetensors").patch_side == 2


def test_a_sample_folder_is_finished_only_when_its_record_is_there(weights, tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sample_folder, "sample_grid", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(weights, tokenizer, twelve(), tmp_path)
    assert (tmp_path / "samples.npz").is_file()
    with pytest.raises(UserError, match="no finished samples"):
        load_samples(tmp_path)
    job = Sampling(weights, tokenizer, twelve(), tmp_path)
    assert job.run() == 0 and job.finish()["count"] == 12


def test_finished_samples_are_kept_and_finished_parts_are_not_sampled_again(weights, tokenizer, tmp_path):
    quiet = tmp_path / "quiet"
    draw(weights, tokenizer, twelve(), quiet)
    before = {path.name: path.stat().st_mtime_ns for path in quiet.iterdir()}
    again = Sampling(replace(weights, open_reader=lambda: 1 / 0), tokenizer, twelve(), quiet)
    assert again.run() == 0 and again.finish()["count"] == 12
    assert {path.name: path.stat().st_mtime_ns for path in quiet.iterdir()} == before

    stopped = tmp_path / "stopped"
    first = Sampling(weights, tokenizer, twelve(), stopped)
    with pytest.raises(KeyboardInterrupt):
        first.run(progress=lambda done, total: done == 10 and raise_(KeyboardInterrupt))
    parts = sorted(path.name for path in stopped.glob(".unfinished/*.npy"))
    assert parts == ["000000.npy"]
    (stopped / ".unfinished/000001.npy").write_bytes(b"half a file")
    resumed = Sampling(weights, tokenizer, twelve(), stopped)
    assert resumed.run() == 7
    resumed.finish()
    assert (stopped / "samples.npz").read_bytes() == (quiet / "samples.npz").read_bytes()
    assert sorted(path.name for path in stopped.iterdir()) == ["grid.png", "samples.json", "samples.npz"]


def raise_(error: type[BaseException]) -> None:
    raise error


@pytest.mark.parametrize("size", [1_000, 5_000, 9_000])
def test_a_full_disk_leaves_no_partial_file_and_a_rerun_finishes(size, weights, tokenizer, tmp_path):
    quiet, full = tmp_path / "quiet", tmp_path / "full"
    draw(weights, tokenizer, twelve(), quiet)
    with files_limited_to(size), pytest.raises(OSError, match="too large"):
        draw(weights, tokenizer, twelve(), full)
    assert not list(full.rglob("*.tmp")) and not (full / "samples.json").exists()
    draw(weights, tokenizer, twelve(), full)
    assert (full / "samples.npz").read_bytes() == (quiet / "samples.npz").read_bytes()


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_samples_or_parts_of_other_settings_is_refused_with_the_difference(
    weights, tokenizer, tmp_path, finished
):
    job = Sampling(weights, tokenizer, twelve(), tmp_path)
    if finished:
        job.run()
        job.finish()
    else:
        with pytest.raises(KeyboardInterrupt):
            job.run(progress=lambda done, total: raise_(KeyboardInterrupt))
    changes = {
        "seed: found 0, requested 1": {"options": Options(seed=1)},
        "cfg_scale: found 1.0, requested 2.5": {"options": Options(cfg_scale=2.5)},
        "count: found 12, requested 15": {"count": 15},
        r"classes: found \[0, 1, 2\], requested \[0, 2\]": {"classes": [0, 2]},
        r"image_size: found \[16, 16\], requested \[24, 24\]": {"image_size": 24},
        "dtype: found 'fp32', requested 'bf16'": {"dtype": "bf16"},
        "labels: found 'balanced', requested 'random'": {"labels": "random"},
    }
    for text, change in changes.items():
        with pytest.raises(UserError, match=f"holds samples made with other settings.*{text}"):
            Sampling(weights, tokenizer, twelve(**change), tmp_path)
    other = replace(weights, fingerprinted=weights.path / "config.yaml")
    with pytest.raises(UserError, match=f"weights_sha256: found '{weights.sha256}', requested '{other.sha256}'"):
        Sampling(other, tokenizer, twelve(), tmp_path)
    for key, value in {"grid_size": 8, "n_heads": 4}.items():
        other = replace(weights, model=weights.model.model_copy(update={key: value}))
        with pytest.raises(UserError, match=f"{key}: found .*, requested {value}"):
            Sampling(other, tokenizer, twelve(image_size=16), tmp_path)
    Sampling(weights, tokenizer, twelve(), tmp_path, batch_size=7)
    if finished:
        (tmp_path / "samples.json").unlink()
        with pytest.raises(UserError, match=r"holds samples\.npz but no record"):
            Sampling(weights, tokenizer, twelve(), tmp_path)
    else:
        with pytest.raises(UserError, match="part_size: found 5, requested 6"):
            Sampling(weights, tokenizer, twelve(part_size=6), tmp_path)


def test_pngs_are_the_images_of_the_file_and_can_be_added_later(weights, tokenizer, tmp_path):
    names = ["cat", "dog, small", "cow"]
    weights = replace(weights, class_names=tuple(names))
    draw(weights, tokenizer, twelve(), tmp_path / "with", png=True)
    draw(weights, tokenizer, twelve(), tmp_path / "later")
    draw(weights, tokenizer, twelve(), tmp_path / "later", png=True)
    images = load_samples(tmp_path / "with")[0]
    for folder in (tmp_path / "with", tmp_path / "later"):
        files = sorted((folder / "images").iterdir())
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(12)]
        np.testing.assert_array_equal([np.asarray(Image.open(file)) for file in files], images)
        rows = list(csv.DictReader(io.StringIO((folder / "labels.csv").read_text())))
        assert rows[4] == {"file": "000004.png", "class": "1", "name": "dog, small"} and len(rows) == 12
        assert not (folder / ".unfinished").exists()


def test_repeated_images_are_counted():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    assert repeated_images(images) == 0
    images[[3, 7, 8]] = images[0]
    assert repeated_images(iter(images)) == 3


def test_bf16_samples_with_a_model_in_bf16(weights, tokenizer, tmp_path):
    job = Sampling(weights, tokenizer, twelve(dtype="bf16"), tmp_path)
    assert {p.dtype for p in job.model.parameters()} == {torch.bfloat16}
    job.run()
    assert job.finish()["dtype"] == "bf16"
    assert repeated_images(load_samples(tmp_path)[0]) == 0


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_captured_steps_make_the_same_bytes_in_one_job_and_in_two_that_were_interrupted(
    weights, tokenizer, tmp_path, monkeypatch, batch_size
):
    """In bf16, where plain and captured steps give other images: none may depend on what a process did before."""
    monkeypatch.setattr(job_module, "worth_capturing", lambda model, images, batch: images > batch)
    request, files = twelve(dtype="bf16", options=Options(cfg_scale=2.0)), []
    for name in ("one", "two"):
        jobs = [Sampling(weights, tokenizer, request, tmp_path / name, batch_size=batch_size) for _ in name[1:]]
        if name == "two":  # two processes, one of them killed in its second part
            with pytest.raises(KeyboardInterrupt):
                jobs[0].run(progress=lambda done, total: done > 5 and raise_(KeyboardInterrupt))
        jobs[1].run()
        jobs[1].finish()
        files.append((tmp_path / name / "samples.npz").read_bytes())
    assert files[0] == files[1]


def test_steps_are_captured_for_more_than_one_batch_on_a_gpu_and_never_if_hooks_gather_weights():
    model = tiny_model()
    assert not worth_capturing(model, 65, 64), "on the CPU nothing is gained"
    on_gpu = SimpleNamespace(modules=lambda: [model], parameters=lambda: iter([SimpleNamespace(is_cuda=True)]))
    assert worth_capturing(on_gpu, 65, 64) and not worth_capturing(on_gpu, 64, 64)
    model.register_forward_hook(lambda *_: None)
    assert not worth_capturing(on_gpu, 65, 64)


def test_impossible_requests_are_refused_before_anything_is_sampled(weights, tokenizer, tmp_path):
    def refused(**changes):
        with pytest.raises(UserError) as error:
            Sampling(weights, tokenizer, twelve(**changes), tmp_path / "out")
        return str(error.value)

    assert "count: 50 images cannot be divided evenly among 3 classes; use 51 or 48" in refused(count=50)
    assert "use 3, or random labels" in refused(count=2)
    assert "classes: some are named twice" in refused(classes=[1, 1])
    both = refused(labels="sorted", dtype="fp8", image_size=0)
    assert all(text in both for text in ("labels: found 'sorted'", "dtype: found 'fp8'", "image_size: found 0"))
    with pytest.raises(UserError, match="batch_size: found 0"):
        Sampling(weights, tokenizer, twelve(), tmp_path / "out", batch_size=0)
    with pytest.raises(UserError, match=r"vq\.safetensors: it has 64 codes, the model has 100"):
        foreign = replace(weights, model=weights.model.model_copy(update={"vocab_size": 100}))
        Sampling(foreign, tokenizer, twelve(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert image_count(3, None, None) == 30 and image_count(3, 50, None) == 150 and image_count(3, None, 7) == 7
    for arguments, text in (((3, 5, 15), "expected one of them"), ((3, 0, None), "per_class: found 0")):
        with pytest.raises(UserError, match=text):
            image_count(*arguments)


def test_a_model_is_filled_tensor_by_tensor(weights):
    """Of the float32 tensors that were read, never more than the one before is still alive."""
    alive = []

    @contextmanager
    def reading():
        with weights.reading() as tensor:

            def watched(name):
                assert sum(reference() is not None for reference in alive) <= 1
                values = tensor(name)
                alive.append(weakref.ref(values))
                return values

            yield watched

    model = build_model(replace(weights, open_reader=reading), "cpu", "bf16")
    assert len(alive) == len(weights.shapes) == len(model.state_dict())
    for name, values in weights.read().items():
        assert torch.equal(model.state_dict()[name], values.bfloat16())


def test_weights_of_another_model_are_refused(weights, tokenizer, tmp_path):
    shapes = {name: shape for name, shape in weights.shapes.items() if name != "output.weight"}
    with pytest.raises(UserError, match=r"do not fit the model of its config.*output\.weight"):
        Sampling(replace(weights, shapes=shapes), tokenizer, twelve(), tmp_path).run()


def test_samples_of_different_settings_go_to_different_folders(weights):
    changes = [
        {},
        {"options": Options(seed=1)},
        {"options": Options(cfg_scale=2.0)},
        {"options": Options(temperature=0.9)},
        {"options": Options(top_k=5)},
        {"options": Options(top_p=0.9)},
        {"options": Options(patch_side=2)},
        {"options": Options(cfg_schedule="linear")},
        {"options": Options(cfg_interval=3)},
        {"labels": "random"},
        {"count": 24},
        {"classes": [0, 2]},
        {"image_size": 24},
        {"dtype": "bf16"},
    ]
    folders = [default_folder(weights, twelve(**change)) for change in changes]
    folders.append(default_folder(replace(weights, variant="ema"), twelve()))
    folders.append(default_folder(replace(weights, step=121), twelve()))
    assert len(set(folders)) == len(folders)
    assert {folder.parent for folder in folders} == {weights.path / "samples"}
    assert folders[5].name == "step-00000120-cfg-1-seed-0-12-images-top-p-0.9"
    file = replace(weights, path=Path("weights/c2i_B_256.pt"), step=None, config=None)
    assert default_folder(file, twelve()) == Path("samples/c2i_B_256/cfg-1-seed-0-12-images")


def test_codes_are_decoded_only_by_the_tokenizer_that_made_them(tmp_path, monkeypatch):
    file = save_tiny_tokenizer(tmp_path / "vq.safetensors")
    (tmp_path / "shards").mkdir()
    made_by = TokenizerInfo(name="vq.safetensors", sha256=sha256(file), downsample=4, precision="fp32")
    shards = {"vocab_size": 64, "num_classes": 3, "class_names": ["cat", "dog", "cow"], "tokenizer": made_by}
    manifest_of([], **shards).save(tmp_path / "shards")
    weights = open_weights(tiny_run(tmp_path / "run", train=tmp_path / "shards"))
    with pytest.raises(UserError, match=r"the codes were made by vq\.safetensors.*not available; give its file with"):
        find_tokenizer(weights)
    assert find_tokenizer(weights, file).sha256 == made_by.sha256
    assert weights.class_names == ("cat", "dog", "cow")
    with pytest.raises(UserError, match=r"fashion_mnist: SHA-256 .*made by vq\.safetensors .*; give that one"):
        find_tokenizer(weights, "fashion_mnist")
    monkeypatch.setattr(loading, "SHIPPED", {"tiny": file})
    assert find_tokenizer(weights).sha256 == made_by.sha256


def test_exported_weights_need_a_tokenizer_and_give_the_samples_of_their_run(weights, tokenizer, tmp_path):
    files = {"safetensors": tmp_path / "tiny.safetensors", "published": tmp_path / "tiny.pt"}
    draw(weights, tokenizer, twelve(), tmp_path / "run")
    for layout, file in files.items():
        export_weights(weights, file, layout=layout)
        found = open_weights(file, grid_size=4, n_heads=2)
        with pytest.raises(UserError, match="give its name or file with --tokenizer"):
            find_tokenizer(found)
        named = find_tokenizer(found, weights.path / "vq.safetensors")
        assert (named.sha256, found.class_names) == (tokenizer.sha256, ())
        record = draw(found, named, twelve(), tmp_path / layout)
        assert record["source"] == str(file) and record["weights_sha256"] == sha256(file)
        np.testing.assert_array_equal(load_samples(tmp_path / layout)[0], load_samples(tmp_path / "run")[0])


def test_the_grid_shows_each_class_in_its_row():
    labels = np.array([1, 0, 1, 0, 1])
    images = np.zeros((5, 32, 32, 3), np.uint8)
    images[labels == 1] = (200, 30, 30)
    picture = np.asarray(sample_grid(images, labels, ["first class", "second class"], per_row=2))
    red = (picture == (200, 30, 30)).all(-1)
    black_cell = picture[8 + 32, -40]
    assert black_cell.tolist() == [0, 0, 0]
    assert red.sum() == 2 * 64 * 64
    assert not red[: 8 + 64].any()
