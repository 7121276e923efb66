"""How samples compare with real images: the Frechet distance between their features, and class agreement.

Features come from any extractor registered with torch-fidelity; the distance itself is computed here in float64.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from npp_ds.errors import UserError
from npp_ds.evaluation.reference import read_images
from npp_ds.files import write_json_atomic
from npp_ds.sampling.folder import load_samples

EVALUATION_FILE = "evaluation.json"


class _Images(Dataset):
    """uint8 [N, H, W, 3] as the uint8 [3, H, W] tensors that torch-fidelity wants."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.images[i]).permute(2, 0, 1).contiguous()


def extract_features(images: np.ndarray, extractor: str, batch_size: int = 256, cuda: bool | None = None) -> np.ndarray:
    """images uint8 [N, H, W, 3] -> float64 [N, d]: the FID features of an extractor registered with torch-fidelity."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

    if extractor not in FEATURE_EXTRACTORS_REGISTRY:
        raise UserError(
            f"extractor: {extractor!r} is not registered; registered: {', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}"
        )
    cuda = torch.cuda.is_available() if cuda is None else cuda
    layer = FEATURE_EXTRACTORS_REGISTRY[extractor].get_default_feature_layer_for_metric("fid")
    network = create_feature_extractor(extractor, [layer], cuda=cuda, verbose=False)
    dataset = _Images(images)
    features = get_featuresdict_from_dataset(dataset, network, batch_size, cuda, save_cpu_ram=True, verbose=False)
    return features[layer].double().numpy()


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """features [N, d] -> mean float64 [d] and unbiased covariance float64 [d, d]. Raises UserError for fewer than 2
    rows.
    """
    if len(features) < 2:
        raise UserError(f"a Frechet distance needs at least 2 images on each side, found {len(features)}")
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) in float64 (Dowson and Landau 1982; FID, arXiv 1706.08500).

    The eigenvalues of A B are taken from the symmetric A^(1/2) B A^(1/2), so covariances may be singular.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    difference = mean_a - mean_b
    return float(max(0.0, difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root))


def class_agreement(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Share of images that the classifier takes for the class they were asked to show, over all and by class number."""
    right = np.asarray(predicted) == np.asarray(labels)
    by_class = {str(c): float(right[labels == c].mean()) for c in np.unique(labels).tolist()}
    return {"class_agreement": float(right.mean()), "class_agreement_by_class": by_class}


def evaluate_samples(
    images: np.ndarray,
    labels: np.ndarray,
    reference_images: np.ndarray,
    reference_labels: np.ndarray | None = None,
    *,
    extractor: str | None = None,
    predict: Callable[[np.ndarray], np.ndarray] | None = None,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Samples and reference uint8 [N, H, W, 3], labels int [N] -> a JSON-able dict with `frechet_distance` and
    `class_agreement`.

    `extractor` and `predict` default to the shipped Fashion-MNIST classifier's. With `reference_labels` the agreement
    of the real images is given too: what a perfect model would reach. Raises UserError when the sizes of the images
    differ.
    """
    if images.shape[1:] != reference_images.shape[1:]:
        raise UserError(
            f"samples are {images.shape[2]}x{images.shape[1]} pixels, the reference {reference_images.shape[2]}x"
            f"{reference_images.shape[1]}; sample with image_size={reference_images.shape[1]} or give another reference"
        )
    if extractor is None or predict is None:
        from npp_ds.evaluation import classifier

        extractor = extractor or classifier.register_classifier_features()
        predict = predict or classifier.predict
    features, reference_features = (extract_features(x, extractor, batch_size) for x in (images, reference_images))
    result = {
        "frechet_distance": frechet_distance(*statistics(features), *statistics(reference_features)),
        **class_agreement(predict(images), labels),
        "num_images": len(images),
        "num_reference_images": len(reference_images),
        "extractor": extractor,
        "feature_dim": features.shape[1],
    }
    if reference_labels is not None:
        reference = class_agreement(predict(reference_images), reference_labels)
        result["reference_class_agreement"] = reference["class_agreement"]
    return result


def evaluate_folder(samples: str | Path, reference: str | Path, **options: Any) -> dict[str, Any]:
    """Evaluates a folder of samples as `sample_run` wrote it against image shards, and writes evaluation.json into it.

    The result of `evaluate_samples`, which takes `options`, with the record of the samples under "samples" and the
    shards under "reference".
    """
    images, labels, record = load_samples(samples)
    result = evaluate_samples(images, labels, *read_images(reference), **options)
    result |= {"reference": str(reference), "samples_dir": str(samples), "samples": record}
    write_json_atomic(Path(samples) / EVALUATION_FILE, result)
    return result
