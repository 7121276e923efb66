"""Evaluation: likelihood over padded batches and ranks, the Frechet distance, class agreement, reading image shards."""

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from npp_ds.errors import UserError
from npp_ds.evaluation.fid import (
    _Images,
    class_agreement,
    evaluate_folder,
    evaluate_samples,
    extract_features,
    frechet_distance,
    statistics,
)
from npp_ds.evaluation.nll import mean_nll
from npp_ds.evaluation.reference import read_images
from npp_ds.model import ModelConfig, Transformer, patches
from npp_ds.sampling.folder import write_samples

EXTRACTOR = "test-projection"
SHIPPED_IMAGES = Path(__file__).parent.parent / "data_prep/fashion_mnist"


class Projection(FeatureExtractorBase):
    """A fixed random projection of the pixels: features whose distance is far from trivial and needs no download."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        matrix = np.random.default_rng(0).standard_normal((3 * 8 * 8, 24)) / 50
        self.register_buffer("matrix", torch.from_numpy(matrix).float())

    @staticmethod
    def get_provided_features_list():
        return ("projection",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "projection"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, x):
        assert x.dtype == torch.uint8
        return (x.float().flatten(1) @ self.matrix,)


@pytest.fixture(scope="module", autouse=True)
def extractor():
    if EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(EXTRACTOR, Projection)


def random_images(count: int, seed: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (count, 8, 8, 3), dtype=np.uint8)


class Counting(nn.Module):
    """Wraps a model as an engine does, and counts calls and the mode they ran in."""

    def __init__(self, model):
        super().__init__()
        self.module, self.calls, self.eval_calls = model, 0, 0

    def forward(self, codes, labels):
        self.calls += 1
        self.eval_calls += not self.training
        return self.module(codes, labels)


@pytest.fixture(scope="module")
def model_and_data():
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=40, grid_size=4, num_classes=5, residual_dropout=0.5)
    )
    nn.init.normal_(model.output.weight, std=0.3)
    codes = patches.group(torch.randint(0, 40, (11, 16)), 2)
    return model, codes, torch.randint(0, 5, (11,))


def padded_batches(codes, labels, micro_batch_size, rank, world_size):
    """What `EvalLoader` promises: equally many full batches for every rank, `count` of whose rows are real."""
    batches = math.ceil(len(codes) / (micro_batch_size * world_size))
    for batch in range(batches):
        first = (batch * world_size + rank) * micro_batch_size
        rows = torch.arange(first, first + micro_batch_size)
        yield (
            codes[rows.clamp(max=len(codes) - 1)],
            labels[rows.clamp(max=len(codes) - 1)],
            int((rows < len(codes)).sum()),
        )


@pytest.mark.parametrize("micro_batch_size", [1, 4, 16])
def test_nll_is_the_mean_over_images_whatever_the_batch_size(model_and_data, micro_batch_size):
    model, codes, labels = model_and_data
    model.train()
    wrapped = Counting(model)
    found = mean_nll(wrapped, padded_batches(codes, labels, micro_batch_size, 0, 1), "cpu")
    assert wrapped.eval_calls == wrapped.calls == math.ceil(11 / micro_batch_size)
    assert model.training and wrapped.training
    model.eval()
    with torch.no_grad():
        log_p = model(codes, labels, output="logits").double().log_softmax(-1)
    assert found == pytest.approx(-log_p.gather(-1, codes).mean().item(), rel=1e-6)


def nll_of_rank(processes, config, state_dict, codes, labels):
    """(mean_nll, calls of the model) on one rank of the pool."""
    model = Transformer(config)
    model.load_state_dict(state_dict)
    wrapped = Counting(model)
    batches = padded_batches(codes, labels, 2, processes.rank, processes.world_size)
    return mean_nll(wrapped, batches, "cpu"), wrapped.calls


def test_nll_calls_the_model_equally_often_on_every_rank_and_sums_over_them(model_and_data, pair):
    model, codes, labels = model_and_data
    codes, labels = codes[:9], labels[:9]
    results = pair.run(nll_of_rank, model.config, model.state_dict(), codes, labels)
    assert [count for *_, count in padded_batches(codes, labels, 2, 1, 2)] == [2, 2, 0]
    expected = mean_nll(model, padded_batches(codes, labels, 9, 0, 1), "cpu")
    for found, calls in results:
        assert found == pytest.approx(expected, rel=1e-6)
        assert calls == 3


def test_nll_restores_the_mode_when_the_model_raises(model_and_data):
    model, codes, labels = model_and_data
    model.train()
    with pytest.raises((IndexError, RuntimeError)):
        mean_nll(model, [(codes + 40, labels, 11)], "cpu")
    assert model.training


def test_frechet_distance_equals_closed_forms():
    rng = np.random.default_rng(0)
    d = 12
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a, b = rng.uniform(0.1, 2, d), rng.uniform(0.1, 2, d)
    shift = rng.standard_normal(d)
    expected = shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(np.zeros(d), (basis * a) @ basis.T, shift, (basis * b) @ basis.T)
    assert found == pytest.approx(expected, rel=1e-9)
    a[3:] = 0
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(shift, (basis * a) @ basis.T, shift, (basis * b) @ basis.T)
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(shift, np.diag(a), shift, np.diag(a)) < 1e-9


def test_frechet_distance_equals_torch_fidelity_and_a_float64_matrix_root():
    images, reference = random_images(300, 1, low=60), random_images(200, 2)
    features = [extract_features(x, EXTRACTOR, batch_size=64, cuda=False) for x in (images, reference)]
    (mean_a, cov_a), (mean_b, cov_b) = (statistics(f) for f in features)
    found = frechet_distance(mean_a, cov_a, mean_b, cov_b)
    root, inverse = cov_a @ cov_b, np.eye(24)
    for _ in range(60):
        root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
    np.testing.assert_allclose(root @ root, cov_a @ cov_b, rtol=1e-6, atol=1e-9)
    closed_form = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert found == pytest.approx(closed_form, rel=1e-6)
    theirs = calculate_metrics(
        input1=_Images(images),
        input2=_Images(reference),
        fid=True,
        feature_extractor=EXTRACTOR,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert found > 1
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)


def test_features_are_in_the_order_of_the_images():
    images = random_images(10, 3)
    whole = extract_features(images, EXTRACTOR, batch_size=4, cuda=False)
    assert whole.shape == (10, 24) and whole.dtype == np.float64
    for i in (0, 5, 9):
        np.testing.assert_allclose(
            extract_features(images[[i]], EXTRACTOR, cuda=False)[0], whole[i], rtol=1e-5, atol=1e-5
        )


def test_class_agreement_counts_right_images_over_all_and_by_class():
    labels = np.array([0, 0, 0, 2, 2])
    result = class_agreement(np.array([0, 0, 1, 2, 0]), labels)
    assert result == {"class_agreement": 0.6, "class_agreement_by_class": {"0": 2 / 3, "2": 0.5}}


def brightness_class(images: np.ndarray) -> np.ndarray:
    return (images.mean((1, 2, 3)) > 140).astype(np.int64)


def write_image_shard(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            for suffix, data in (("png", png.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_folder_of_samples_is_evaluated_against_image_shards(tmp_path):
    bright, dark = random_images(40, 4, low=100), random_images(40, 5)
    reference = np.concatenate([dark, bright])
    for part, rows in enumerate((slice(0, 50), slice(50, 80))):
        write_image_shard(tmp_path / f"val-{part:06d}.tar.gz", reference[rows], np.repeat([0, 1], 40)[rows])
    read, labels = read_images(tmp_path / "val-*.tar.gz")
    np.testing.assert_array_equal(read, reference)
    np.testing.assert_array_equal(labels, np.repeat([0, 1], 40))
    asked = np.repeat([0, 1, 0], [40, 30, 10])
    write_samples(tmp_path / "samples", reference, asked, {"seed": 3, "cfg_scale": 1.5})
    result = evaluate_folder(
        tmp_path / "samples", tmp_path / "val-*.tar.gz", extractor=EXTRACTOR, predict=brightness_class
    )
    assert result["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert result["class_agreement"] == 70 / 80
    assert result["reference_class_agreement"] == 1
    assert result["samples"]["seed"] == 3
    assert json.loads((tmp_path / "samples/evaluation.json").read_text()) == result
    worse = evaluate_samples(bright, asked[:40], reference, extractor=EXTRACTOR, predict=brightness_class)
    assert worse["frechet_distance"] > 1 and worse["class_agreement"] == 0


def test_the_shipped_classifier_prefers_real_images_to_spoilt_ones():
    images, labels = read_images(SHIPPED_IMAGES / "val-*.tar.gz", limit=600)
    real = evaluate_samples(images[:300], labels[:300], images[300:], labels[300:])
    assert real["class_agreement"] > 0.8 and real["reference_class_agreement"] > 0.8
    spoilt = images[:300] // 2
    assert evaluate_samples(spoilt, labels[:300], images[300:])["frechet_distance"] > 1.5 * real["frechet_distance"]
    assert evaluate_samples(images[:300], (labels[:300] + 1) % 10, images[300:])["class_agreement"] < 0.15


def test_unusable_inputs_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no image shard found"):
        read_images(tmp_path / "val-*.tar")
    with pytest.raises(UserError, match="samples are 8x8 pixels, the reference 9x9"):
        evaluate_samples(random_images(4, 0), np.zeros(4), np.zeros((4, 9, 9, 3), np.uint8))
    with pytest.raises(UserError, match="'inception' is not registered"):
        extract_features(random_images(4, 0), "inception")
    with pytest.raises(UserError, match="at least 2 images"):
        statistics(np.zeros((1, 3)))
    with pytest.raises(UserError, match="no finished samples"):
        evaluate_folder(tmp_path, tmp_path)
