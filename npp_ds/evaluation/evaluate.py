"""Samples against a reference: every metric, the record of how both were made, and one JSON of it all."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from npp_ds import __version__
from npp_ds.errors import UserError
from npp_ds.evaluation.caveats import warnings_of
from npp_ds.evaluation.features import (
    FASHION_MNIST,
    INCEPTION,
    Extractor,
    Measurement,
    Progress,
    load_extractor,
    measure,
)
from npp_ds.evaluation.fid import frechet_distance
from npp_ds.evaluation.images import ImageSet
from npp_ds.evaluation.output_paths import try_target, writing
from npp_ds.evaluation.precision_recall import NEIGHBOURS, precision_recall
from npp_ds.evaluation.reference import Reference, recorded_extractor
from npp_ds.evaluation.scores import class_agreement, inception_score
from npp_ds.utils.files import write_json_atomic
from npp_ds.utils.records import git_commit

EVALUATION_FILE = "evaluation.json"
AUTO = "auto"


def open_extractor(name: str, reference: str | Path, tokenizer: str | None, weights: str | Path | None) -> Extractor:
    """`load_extractor`, where "auto" means that of the reference's statistics; and for a reference of images the
    Fashion-MNIST classifier where the samples were decoded by the shipped tokenizer of these images, else Inception.
    """
    if name == AUTO:
        name = recorded_extractor(reference) or (FASHION_MNIST if tokenizer == FASHION_MNIST else INCEPTION)
    return load_extractor(name, weights)


def evaluate_images(
    images: ImageSet, reference: Reference, extractor: Extractor, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """A JSON-able dict: `frechet_distance` (FID with Inception), `spatial_frechet_distance` (sFID) where the reference
    has spatial statistics, `inception_score`, `precision`, `recall`, `class_agreement` where the extractor knows the
    classes, and what they rest on.
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
        "warnings": warnings_of(images, measured, reference, extractor),
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
    if extractor.judges_classes and images.labels is not None:
        found |= class_agreement(measured.predicted, images.labels)
        if reference.source.class_agreement is not None:
            found["reference_class_agreement"] = reference.source.class_agreement
    return found


def result_file(samples: str | Path, out: str | Path | None = None) -> Path:
    """`out`, else evaluation.json in the samples' folder. UserError when nothing can be written there."""
    samples = Path(samples)
    return try_target(out or (samples if samples.is_dir() else samples.parent) / EVALUATION_FILE)


def write_result(result: dict[str, Any], out: str | Path | None = None) -> Path:
    """Writes to `result_file`; returns where."""
    path = result_file(result["samples_dir"], out)
    with writing(path):
        write_json_atomic(path, result)
    return path


def rows_of(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(key, name, value) for people, of the metrics that the result has."""
    distance = "FID" if result["extractor"] == INCEPTION else "Frechet distance"
    spatial = "sFID" if result["extractor"] == INCEPTION else "spatial Frechet distance"
    values = [
        (distance, "frechet_distance", "{:.2f}"),
        (spatial, "spatial_frechet_distance", "{:.2f}"),
        ("Inception score", "inception_score", "{:.2f}"),
        ("precision", "precision", "{:.4f}"),
        ("recall", "recall", "{:.4f}"),
        ("samples showing the class asked for", "class_agreement", "{:.1%}"),
        ("real images showing it", "reference_class_agreement", "{:.1%}"),
    ]
    return [(key, name, form.format(result[key])) for name, key, form in values if key in result]


def describe(result: dict[str, Any]) -> str:
    """What was compared, the metrics as a small table, and every warning."""
    rows = rows_of(result)
    width = max(len(name) for _, name, _ in rows)
    of = f"{result['num_reference_images']:,} images" if result["num_reference_images"] else "statistics"
    lines = [f"{result['num_images']:,} samples of {result['samples_dir']}"]
    lines += [f"against {of} of {result['reference']['path']}, features of {result['extractor']}"]
    lines += [f"  {name:<{width}}  {value:>8}" for _, name, value in rows]
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
