"""The shipped classifier classifies shipped images, and its Frechet distance equals torch-fidelity's."""

import runpy
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from extractors import fidelity_distance, statistics
from npp_ds.errors import UserError
from npp_ds.evaluation.extractors import (
    SHIPPED,
    Classifier,
    ClassifierExtractor,
    load_classifier,
)
from npp_ds.evaluation.metrics import frechet_distance
from npp_ds.tokenizer import load_tokenizer
from npp_ds.tokenizer.sources import load_images, open_source

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "data_prep" / "train_classifier.py"


@pytest.fixture(scope="module")
def validation():
    return load_images(open_source([ROOT / "data_prep" / "fashion_mnist"], "val"), 32)


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(TRAINING))


def likeliest(images: np.ndarray) -> np.ndarray:
    return ClassifierExtractor()(images).probabilities.argmax(-1)


def test_at_least_89_percent_of_the_shipped_validation_images_are_classified_right(validation):
    images, labels = validation
    assert len(labels) == 1000 and (likeliest(images) == labels).mean() >= 0.89
    assert SHIPPED.stat().st_size < 5e5


@pytest.mark.parametrize("channels", [1, 3])
def test_a_classifier_of_other_widths_loads_and_sees_colours_if_it_has_three_channels(script, tmp_path, channels):
    torch.manual_seed(0)
    script["save_classifier"](Classifier(4, (channels, 8, 8, 16)).eval(), tmp_path / "small.safetensors")
    extractor = ClassifierExtractor(path=tmp_path / "small.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    first, turned = extractor(images), extractor(images[..., ::-1].copy())
    assert (extractor.name, first.probabilities.shape) == ("small.safetensors", (2, 4))
    assert np.allclose(first.pool, turned.pool, atol=1e-5) == (channels == 1)


def test_reconstructions_of_the_shipped_tokenizer_are_classified_nearly_as_well(validation, script):
    images, labels = validation
    decoded = script["reconstruct"](load_tokenizer("fashion_mnist"), images)
    assert decoded.shape == images.shape and (likeliest(decoded) == labels).mean() >= 0.86


def test_torch_fidelity_and_we_compute_the_same_distance_which_grows_with_the_damage(validation):
    extractor = ClassifierExtractor()

    def distance(images):
        pairs = (statistics(extractor(part).pool) for part in (images, validation[0][500:]))
        found = frechet_distance(*(part for pair in pairs for part in pair))
        assert found == pytest.approx(fidelity_distance(extractor, images, validation[0][500:]), rel=1e-3, abs=1e-3)
        return found

    real = validation[0][:500]
    noise = np.random.default_rng(0).integers(-60, 61, real.shape)
    noisy = (real + noise).clip(0, 255).astype(np.uint8)
    assert distance(validation[0][500:]) < 0.01 < distance(real) < distance(noisy) / 3


def test_features_are_the_input_of_the_last_layer(validation):
    images = validation[0][:8]
    model, found = load_classifier(), ClassifierExtractor()(images)
    assert found.pool.shape == (8, ClassifierExtractor.feature_dim) and found.pool.dtype == np.float32
    logits = model(torch.from_numpy(images))
    torch.testing.assert_close(model.output(torch.from_numpy(found.pool)), logits)
    np.testing.assert_allclose(found.probabilities, logits.softmax(-1).numpy(), rtol=1e-5)
    assert found.spatial is None


def test_images_of_another_size_or_type_are_refused():
    for images in (np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 32, 32, 3), np.float32)):
        with pytest.raises(UserError, match=r"32, 32, 3"):
            ClassifierExtractor()(images)


def test_a_trained_classifier_is_reproducible_and_survives_its_file(validation, script, tmp_path):
    images, labels = validation[0][:256], validation[1][:256]
    options = Namespace(seed=0, epochs=6, batch_size=32, learning_rate=2e-3, widths=[1, 32, 48, 64])
    first, second = (script["fit"](images, labels, options) for _ in range(2))
    predict, save_classifier = script["predict"], script["save_classifier"]
    assert (predict(images, first) == labels).mean() > 0.7
    save_classifier(first, tmp_path / "c.safetensors")
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert np.array_equal(predict(images, first), predict(images, second))
    assert (predict(images, loaded) == predict(images, first)).mean() > 0.99


def test_files_that_hold_no_classifier_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "wrong.safetensors"
    for content in (None, b"text", {"x": torch.zeros(3)}, {"output.bias": torch.zeros(10)}):
        if isinstance(content, dict):
            save_file(content, path)
        elif content:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"wrong\.safetensors"):
            load_classifier(path)
