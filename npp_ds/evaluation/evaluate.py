"""Compare samples with a reference: choose the extractor, compute every metric, write one JSON result."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from npp_ds import __version__
from npp_ds.errors import UserError
from npp_ds.evaluation.caveats import find_caveats
from npp_ds.evaluation.classifier import ClassifierExtractor
from npp_ds.evaluation.features import FASHION_MNIST, INCEPTION, Extractor, Measurement, Progress, measure
from npp_ds.evaluation.images import ImageSet
from npp_ds.evaluation.inception import Inception
from npp_ds.evaluation.metrics import NEIGHBOURS, class_agreement, frechet_distance, inception_score, precision_recall
from npp_ds.evaluation.reference import Reference, recorded_extractor
from npp_ds.utils.files import check_writable, explain_os_errors, write_json_atomic
from npp_ds.utils.format import utc_now
from npp_ds.utils.git import git_commit

EVALUATION_FILE = "evaluation.json"
AUTO = "auto"


def load_extractor(name: str, weights: str | Path | None = None, device: str | torch.device | None = None) -> Extractor:
    """Load the extractor of that name. `weights` is a file to use instead of Inception's standard weights.

    Raises UserError for an unknown name and for missing or damaged weights.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == INCEPTION:
        return Inception(weights, device)
    if name == FASHION_MNIST:
        return ClassifierExtractor(device)
    raise UserError(f"extractor: found {name!r}, expected {INCEPTION} or {FASHION_MNIST}")


def open_extractor(name: str, reference: str | Path, tokenizer: str | None, weights: str | Path | None) -> Extractor:
    """Load an extractor by name; "auto" chooses the one that made the statistics of the reference.

    For a reference of images, "auto" is the Fashion-MNIST classifier if the shipped tokenizer of these images decoded
    the samples, else Inception.
    """
    if name == AUTO:
        name = recorded_extractor(reference) or (FASHION_MNIST if tokenizer == FASHION_MNIST else INCEPTION)
    return load_extractor(name, weights)


def evaluate_images(
    images: ImageSet, reference: Reference, extractor: Extractor, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Return a dict for JSON with the metrics and everything that they depend on.

    The metrics are `frechet_distance` (FID with Inception), `spatial_frechet_distance` (sFID) if the reference has
    spatial statistics, `inception_score`, `precision`, `recall`, and `class_agreement` if the extractor judges classes.
    """
    measured = measure(images, extractor, progress=progress)
    return {
        **_metrics(images, measured, reference, extractor),
        "num_images": measured.count,
        "image_size": measured.image_size,
        "num_reference_images": reference.source.num_images,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "extractor_is_standard": extractor.standard,
        "feature_dim": extractor.feature_dim,
        "reference": {"path": reference.path, "sha256": reference.sha256, **asdict(reference.source)},
        "samples_dir": images.path,
        "samples_sha256": measured.sha256,
        "samples": images.record,
        "warnings": find_caveats(images, measured, reference, extractor),
        "created_by": f"npp_ds {__version__}",
        "git_commit": git_commit(),
    }


def _metrics(images: ImageSet, measured: Measurement, reference: Reference, extractor: Extractor) -> dict[str, Any]:
    found: dict[str, Any] = {"frechet_distance": frechet_distance(*measured.pool, *reference.pool)}
    if measured.spatial is not None and reference.spatial is not None:
        if measured.spatial[0].shape != reference.spatial[0].shape:
            raise UserError(
                f"{reference.path}: spatial statistics of {reference.spatial[0].size} features, expected "
                f"{measured.spatial[0].size} of {extractor.name}"
            )
        found["spatial_frechet_distance"] = frechet_distance(*measured.spatial, *reference.spatial)
    if measured.probabilities is not None:
        found["inception_score"] = inception_score(measured.probabilities)
    if reference.features is not None and min(len(reference.features), measured.count) > NEIGHBOURS:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        precision, recall = precision_recall(reference.features, measured.features, device=device)
        found |= {"precision": precision, "recall": recall, "num_manifold_images": len(reference.features)}
    if measured.predicted is not None and images.labels is not None:
        found |= class_agreement(measured.predicted, images.labels)
        if reference.source.class_agreement is not None:
            found["reference_class_agreement"] = reference.source.class_agreement
    return found


def result_file(samples: str | Path, out: str | Path | None = None) -> Path:
    """Return `out`, or evaluation.json in the folder of the samples. Raises UserError if it cannot be written."""
    samples = Path(samples)
    return check_writable(out or (samples if samples.is_dir() else samples.parent) / EVALUATION_FILE)


def write_result(result: dict[str, Any], out: str | Path | None = None) -> Path:
    """Write a result and the time to its `result_file`. Return the path."""
    path = result_file(result["samples_dir"], out)
    with explain_os_errors(path):
        write_json_atomic(path, {**result, "finished_at": utc_now()})
    return path


def rows_of(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (key, name, formatted value) of the metrics in a result."""
    distance = "FID" if result["extractor"] == INCEPTION else "Frechet distance"
    spatial = "sFID" if result["extractor"] == INCEPTION else "spatial Frechet distance"
    values = [
        (distance, "frechet_distance", "{:.2f}"),
        (spatial, "spatial_frechet_distance", "{:.2f}"),
        ("Inception score", "inception_score", "{:.2f}"),
        ("precision", "precision", "{:.4f}"),
        ("recall", "recall", "{:.4f}"),
        ("samples that show the requested class", "class_agreement", "{:.1%}"),
        ("real images that show their class", "reference_class_agreement", "{:.1%}"),
    ]
    return [(key, name, form.format(result[key])) for name, key, form in values if key in result]


def describe(result: dict[str, Any]) -> str:
    """Return what was compared, the metrics as a small table, and every warning, as text."""
    rows = rows_of(result)
    width = max(len(name) for _, name, _ in rows)
    of = f"{result['num_reference_images']:,} images" if result["num_reference_images"] else "statistics"
    lines = [f"{result['num_images']:,} samples of {result['samples_dir']}"]
    lines += [f"against {of} of {result['reference']['path']}, features of {result['extractor']}"]
    lines += [f"  {name:<{width}}  {value:>8}" for _, name, value in rows]
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
