"""Sampling a run: labels, independence of batching, pixels by the published rule, the folder of samples, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from npp_ds.config import RunConfig
from npp_ds.data.shards import CropInfo, Manifest, TokenizerInfo
from npp_ds.errors import UserError
from npp_ds.files import sha256
from npp_ds.model import ModelConfig, Transformer
from npp_ds.model.patches import group
from npp_ds.sampling import sampler
from npp_ds.sampling.folder import load_samples, repeated_images
from npp_ds.sampling.grid import sample_grid
from npp_ds.sampling.sampler import Options, labels_of, parse_classes, resize, sample_images, sample_run
from npp_ds.tokenizer import vq

MODEL = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 24, "grid_size": 4, "num_classes": 3}


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(1)
    config = vq.VQConfig(
        channels=8, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=8, codebook_size=24, norm_groups=4
    )
    model = vq.VQModel(config).eval()
    model.name, model.sha256 = "tiny", "a" * 64
    return model


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**MODEL))
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model.state_dict()


@pytest.fixture
def run_dir(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(vq, "load_tokenizer", lambda name: tokenizer)
    config = RunConfig(name="tiny", model=MODEL, data={"train": str(tmp_path / "none"), "tokenizer": "tiny"})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    return tmp_path


def test_balanced_labels_are_exactly_balanced_and_grow_without_changing():
    few, many = (labels_of(np.arange(n), [7, 2, 5], "balanced", 0) for n in (30, 150))
    assert {c: int((many == c).sum()) for c in (2, 5, 7)} == {2: 50, 5: 50, 7: 50}
    np.testing.assert_array_equal(few, many[:30])


def test_random_labels_are_uniform_and_depend_on_seed_and_index_only():
    indices = np.arange(30_000)
    labels = labels_of(indices, list(range(10)), "random", 4)
    counts = np.bincount(labels, minlength=10)
    assert ((counts - 3000) ** 2 / 3000).sum() < 30
    np.testing.assert_array_equal(labels_of(indices[[5, 29_999]], list(range(10)), "random", 4), labels[[5, 29_999]])
    assert (labels_of(indices, list(range(10)), "random", 5) == labels).mean() < 0.2
    with pytest.raises(UserError, match="balanced, random"):
        labels_of(indices, [0], "sorted", 0)


def test_classes_are_numbers_or_names_and_unknown_ones_are_all_named():
    names = ["cat", "dog", "3"]
    assert parse_classes(["dog", "0", 2], 3, names) == [1, 0, 2]
    assert parse_classes(None, 3, names) == [0, 1, 2]
    with pytest.raises(UserError, match=r"found cow, 7, expected numbers 0\.\.2 or one of cat, dog"):
        parse_classes(["dog", "cow", 7], 3, names)


def test_pixels_are_truncated_by_the_published_rule_after_resizing():
    model_output = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.0039, 0.00392, 0.5, 0.9999, 1.0, 3.0])
    images = model_output.view(1, 1, 1, -1).expand(1, 3, 1, -1)
    expected = [0, 0, 64, 128, 128, 128, 191, 255, 255, 255]
    assert vq.to_uint8(images)[0, 0, :, 0].tolist() == expected
    ramp = torch.linspace(-1, 1, 8).view(1, 1, 1, 8).expand(1, 3, 8, 8)
    published = torch.nn.functional.interpolate(ramp, size=(12, 12), mode="bicubic")
    assert torch.equal(resize(ramp, 12), published)
    assert resize(ramp, 8) is ramp and resize(ramp, None) is ramp


def test_an_image_is_the_same_at_any_batch_size_and_in_any_subset(weights, tokenizer):
    model = Transformer(ModelConfig(**MODEL)).eval()
    model.load_state_dict(weights)
    indices = np.arange(20)
    labels = labels_of(indices, [0, 1, 2], "balanced", 0)
    options = Options(seed=3, cfg_scale=1.5)
    whole = sample_images(model, tokenizer.decode, labels, indices, options, batch_size=20)
    assert whole.shape == (20, 8, 8, 3) and whole.dtype == np.uint8
    assert repeated_images(whole) == 0
    for rows, batch_size in ((indices, 3), (indices[7:], 5), (indices[::-3].copy(), 1)):
        part = sample_images(model, tokenizer.decode, labels[rows], rows, options, batch_size=batch_size)
        np.testing.assert_allclose(part.astype(int), whole[rows].astype(int), atol=1)
    other = sample_images(model, tokenizer.decode, labels, indices, replace(options, seed=4))
    assert (other != whole).any(axis=(1, 2, 3)).all()


def test_a_run_is_sampled_into_a_folder_that_can_be_read_back(run_dir, weights):
    done = []
    samples = sample_run(
        run_dir,
        per_class=4,
        options=Options(seed=2, cfg_scale=2.0),
        batch_size=5,
        image_size=16,
        device="cpu",
        state_dict=weights,
        step=120,
        progress=lambda count, total: done.append((count, total)),
    )
    assert done == [(5, 12), (10, 12), (12, 12)]
    assert samples.directory == run_dir / "samples/step-00000120-cfg-2-seed-2"
    with np.load(samples.directory / "samples.npz") as file:
        assert file.files == ["arr_0", "labels"]
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (12, 16, 16, 3)
    images, labels, record = load_samples(samples.directory)
    np.testing.assert_array_equal(images, samples.images)
    assert labels.tolist() == [0, 1, 2] * 4
    expected = {"checkpoint_step": 120, "seed": 2, "cfg_scale": 2.0, "labels": "balanced", "per_class": 4, "count": 12}
    assert expected.items() <= record.items()
    assert record["tokenizer"] == {"name": "tiny", "sha256": "a" * 64}
    assert json.loads((samples.directory / "samples.json").read_text()) == record
    assert Image.open(samples.directory / "grid.png").size[1] >= 3 * 64
    assert not list(samples.directory.glob(".*"))


def test_given_weights_given_classes_and_a_coarse_side_are_used(run_dir, weights, tokenizer, monkeypatch):
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda codes: decoded.append(codes) or decode(codes))
    options = Options(patch_side=2, seed=9)
    samples = sample_run(
        run_dir,
        state_dict=weights,
        step=7,
        out=run_dir / "looked",
        classes=[2],
        options=options,
        per_class=6,
        device="cpu",
    )
    assert samples.directory == run_dir / "looked"
    assert samples.labels.tolist() == [2] * 6 and samples.record["checkpoint_step"] == 7
    (codes,) = decoded
    patches = group(codes, 2)
    assert (patches == patches[..., :1]).all()
    assert len(patches[..., 0].unique()) > 4


def test_a_sample_folder_is_finished_only_when_its_record_is_there(run_dir, weights, monkeypatch):
    run = {"run_dir": run_dir, "state_dict": weights, "out": run_dir / "out", "per_class": 1, "device": "cpu"}
    sample_run(**run)
    monkeypatch.setattr("npp_ds.sampling.folder.sample_grid", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample_run(**run)
    with pytest.raises(UserError, match="no finished samples"):
        load_samples(run_dir / "out")


def test_weights_of_another_model_and_missing_runs_are_refused(run_dir, weights, tmp_path):
    with pytest.raises(UserError, match=r"do not fit the model of config\.yaml.*output\.weight"):
        sample_run(run_dir, state_dict={k: v for k, v in weights.items() if k != "output.weight"}, device="cpu")
    with pytest.raises(UserError, match=r"config\.yaml: not found"):
        sample_run(tmp_path / "nowhere", state_dict=weights)
    with pytest.raises(UserError, match=r"per_class: found 0"):
        sample_run(run_dir, state_dict=weights, per_class=0)


def test_samples_of_different_settings_go_to_different_folders(run_dir, weights):
    settings = [
        {},
        {"seed": 1},
        {"cfg_scale": 2.0},
        {"temperature": 0.9},
        {"top_k": 5},
        {"top_p": 0.9},
        {"patch_side": 2},
    ]
    run = {"run_dir": run_dir, "state_dict": weights, "per_class": 1, "device": "cpu"}
    folders = [sample_run(**run, options=Options(**s)).directory for s in settings]
    folders.append(sample_run(**run, labels="random").directory)
    assert len(set(folders)) == len(folders)
    assert folders[5].name == "step-00000000-cfg-1-seed-0-top-p-0.9"


def test_codes_are_decoded_only_by_the_tokenizer_that_made_them(run_dir, weights, tokenizer, monkeypatch):
    run = {"run_dir": run_dir, "state_dict": weights, "per_class": 1, "device": "cpu"}
    (run_dir / "shards").mkdir()
    (run_dir / "tiny.safetensors").write_bytes(b"tiny")
    made_by = TokenizerInfo(name="tiny", sha256=sha256(run_dir / "tiny.safetensors"), downsample=2, precision="fp32")
    shards = Manifest(
        split="train",
        grid_size=4,
        vocab_size=24,
        num_classes=3,
        class_names=["cat", "dog", "cow"],
        image_size=8,
        tokenizer=made_by,
        crops=CropInfo(scheme="center", ranges=[1.0], names=["center"]),
        num_samples=0,
        shards=[],
        source={},
        skipped=[],
    )
    shards.save(run_dir / "shards")
    config = RunConfig(name="tiny", model=MODEL, data={"train": str(run_dir / "shards")})
    (run_dir / "config.yaml").write_text(config.to_yaml())
    monkeypatch.setattr(sampler, "SHIPPED", {})
    with pytest.raises(UserError, match=r"data\.tokenizer: not set, and the codes were made by tiny"):
        sample_run(**run)
    monkeypatch.setattr(sampler, "SHIPPED", {"tiny": run_dir / "tiny.safetensors"})
    with pytest.raises(UserError, match=r"data\.tokenizer: tiny has SHA-256 aaaaaaaaaaaa\.\..*made by tiny"):
        sample_run(**run)
    monkeypatch.setattr(tokenizer, "sha256", made_by.sha256)
    assert sample_run(**run, classes=["cow"]).labels.tolist() == [2]


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
