"""Inception's features, its file of weights, and whole evaluations with it, all with random weights."""

import hashlib
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch_fidelity import calculate_metrics

from extractors import random_inception, statistics
from npp_ds.errors import UserError
from npp_ds.evaluation import extractors
from npp_ds.evaluation.evaluate import describe, evaluate_images, load_extractor, load_reference
from npp_ds.evaluation.extractors import Inception, find_weights
from npp_ds.evaluation.images import open_images
from npp_ds.evaluation.metrics import precision_recall
from npp_ds.tokenizer.sources import load_images, open_source

SHIPPED_IMAGES = Path(__file__).parents[2] / "data_prep/fashion_mnist"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(scope="module")
def extractor(weights) -> Inception:
    return load_extractor("inception", weights, "cpu")


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    return load_images(open_source([SHIPPED_IMAGES], "val"), 32)[0]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The folder where torch-fidelity's download would lie, empty, and no server to fetch from."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(extractors, "WEIGHTS_URL", f"http://127.0.0.1:9/{extractors.WEIGHTS_FILE}")
    return tmp_path / "torch/hub/checkpoints"


@torch.no_grad()
def spatial_by_hand(network, images: np.ndarray) -> np.ndarray:
    """ReLU of the normalised 1x1 convolution that begins Mixed_6d, first 7 channels, channels last."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = inception_input(x)
    for name in (
        "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
        "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c",
    ):  # fmt: skip
        x = getattr(network, name)(x)
    branch = network.Mixed_6d.branch1x1
    x = F.relu(branch.bn(branch.conv(x)))
    return x.numpy()[:, :7].transpose(0, 2, 3, 1).reshape(len(images), -1)


def inception_input(x: torch.Tensor) -> torch.Tensor:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return (interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False) - 128) / 128


def test_spatial_features_are_the_first_seven_channels_of_mixed_6_conv(extractor, real):
    found = extractor(real[:2])
    assert found.pool.shape == (2, 2048) and found.probabilities.shape == (2, 1008)
    assert found.spatial.shape == (2, 7 * 17 * 17) == (2, 2023)
    assert all(x.dtype == np.float32 for x in (found.pool, found.spatial, found.probabilities))
    np.testing.assert_allclose(found.spatial, spatial_by_hand(extractor._network, real[:2]), rtol=1e-4, atol=1e-5)
    assert found.spatial.min() == 0 and found.spatial.std() > 0.1
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    logits = torch.from_numpy(found.pool) @ extractor._network.fc.weight.T
    np.testing.assert_allclose(found.probabilities, logits.softmax(-1).numpy(), rtol=1e-4)


@pytest.mark.slow
def test_distance_and_score_of_two_folders_equal_torch_fidelity_s_own(extractor, weights, real, tmp_path):
    sets = {"samples": real[:14] // 2, "train": real[500:512]}
    for name, images in sets.items():
        for i, image in enumerate(images):
            folder = tmp_path / name / f"class-{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:03d}.png")
    reference = load_reference(tmp_path / "train", extractor)
    result = evaluate_images(open_images(tmp_path / "samples"), reference, extractor)
    theirs = calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(tmp_path / "train"),
        samples_find_deep=True,
        fid=True,
        isc=True,
        isc_splits=1,
        rng_seed=0,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
        cache=False,
    )
    assert result["frechet_distance"] > 1 and result["inception_score"] > 1.005
    assert result["frechet_distance"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert result["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


def distance_of_few(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of few features [n, d] without any d x d matrix: tr (A B)^(1/2) is the sum of the singular
    values of the centred a b^T.
    """
    (mean_a, a), (mean_b, b) = ((x.mean(0), (x - x.mean(0)) / (len(x) - 1) ** 0.5) for x in (a, b))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross


def test_a_reference_file_of_adm_gives_distances_by_its_statistics_and_precision_by_its_images(
    extractor, real, tmp_path
):
    others, samples = (extractor(images) for images in (real[30:35] // 2, real[:6]))
    arrays = dict(zip(("mu", "sigma"), statistics(others.pool), strict=True))
    arrays |= dict(zip(("mu_s", "sigma_s"), statistics(others.spatial), strict=True))
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(path, arr_0=real[20:24], **arrays)
    np.savez(tmp_path / "samples.npz", arr_0=real[:6])
    reference = load_reference(path, extractor)
    np.testing.assert_allclose(reference.features, extractor(real[20:24]).pool, rtol=1e-4, atol=1e-5)
    result = evaluate_images(open_images(tmp_path / "samples.npz"), reference, extractor)
    for key, a, b in (
        ("frechet_distance", samples.pool, others.pool),
        ("spatial_frechet_distance", samples.spatial, others.spatial),
    ):
        expected = distance_of_few(a.astype(np.float64), b.astype(np.float64))
        assert expected > 1 and result[key] == pytest.approx(expected, rel=1e-3), key
    precision, recall = precision_recall(reference.features, samples.pool)
    assert (result["precision"], result["recall"]) == (precision, recall)
    assert result["num_manifold_images"] == 4 and result["num_reference_images"] is None
    assert result["reference"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert result["extractor_sha256"] == extractor.sha256 and not result["extractor_is_standard"]
    text = describe(result)
    assert all(f"  {name} " in text for name in ("FID", "sFID", "Inception score", "precision", "recall"))
    for expected in (
        "Inception's weights are not the standard ones",
        "6 samples are too few for 2048 features: the covariance is singular",
        "6 samples, published figures are of 50,000",
    ):
        assert sum(expected in warning for warning in result["warnings"]) == 1, expected
        assert f"warning: {expected}" in text
    assert len(result["warnings"]) == 3


def test_weights_that_cannot_be_fetched_are_an_error_with_name_address_hash_and_place(hub, tmp_path):
    with pytest.raises(UserError) as caught:
        load_extractor("inception")
    for part in (extractors.WEIGHTS_FILE, extractors.WEIGHTS_URL, "SHA-256 6726825d", str(hub), "--inception-weights"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"other\.pth: not found; expected weights-inception.*github|127"):
        load_extractor("inception", tmp_path / "other.pth")


def test_the_address_and_hash_are_torch_fidelity_s():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert extractors.WEIGHTS_URL == URL_INCEPTION_V3
    assert f"-{extractors.WEIGHTS_SHA256}." in URL_INCEPTION_V3


@pytest.fixture
def server(tmp_path, hub, monkeypatch):
    """Serves the folder it returns in place of torch-fidelity's address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(
            extractors, "WEIGHTS_URL", f"http://127.0.0.1:{served.server_port}/{extractors.WEIGHTS_FILE}"
        )
        yield folder
        served.shutdown()
        thread.join()


def test_fetched_weights_are_checked_and_kept_where_torch_fidelity_looks(server, hub, monkeypatch):
    content = os.urandom(1000)
    (server / extractors.WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(UserError, match="the fetched file has another SHA-256"):
        find_weights()
    assert not hub.exists()
    monkeypatch.setattr(extractors, "WEIGHTS_SHA256", hashlib.sha256(content).hexdigest()[:8])
    path, digest = find_weights()
    assert path == hub / extractors.WEIGHTS_FILE and path.read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()
    (server / extractors.WEIGHTS_FILE).unlink()
    assert find_weights()[0] == path
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="damaged, its SHA-256 begins with"):
        find_weights()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_hold_no_inception_are_refused_and_run_nothing(tmp_path):
    for content in ({"fc.weight": torch.zeros(3)}, torch.zeros(3), Touch(tmp_path / "touched"), None):
        path = tmp_path / "mine.pth"
        if content is None:
            path.write_bytes(b"text")
        else:
            torch.save(content, path)
        with pytest.raises(UserError, match=r"mine\.pth: holds no weights of torch-fidelity's Inception"):
            load_extractor("inception", path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda tensor: tensor * torch.nan, "values are NaN or infinite"),
        (lambda tensor: tensor.to(torch.int8), "is torch.int8, expected a floating-point type"),
        (torch.Tensor.to_sparse, "is torch.sparse_coo"),
    ],
)
def test_each_tensor_of_inception_is_checked(weights, tmp_path, change, reason):
    tensors = torch.load(weights)
    torch.save({**tensors, "fc.weight": change(tensors["fc.weight"])}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=rf"mine\.pth: holds no weights .*\(fc\.weight.* {reason}"):
        load_extractor("inception", tmp_path / "mine.pth")
