"""Samples against a reference: every metric, caveats of the comparison, and one JSON of it all."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from npp_ds import __version__
from npp_ds.errors import UserError
from npp_ds.evaluation.extractors import (
    FASHION_MNIST,
    INCEPTION,
    ClassifierExtractor,
    Extractor,
    Inception,
    Measurement,
    Progress,
    measure,
)
from npp_ds.evaluation.images import RECONSTRUCTION, ImageSet
from npp_ds.evaluation.metrics import NEIGHBOURS, class_agreement, frechet_distance, inception_score, precision_recall
from npp_ds.evaluation.reference import Reference, recorded_extractor
from npp_ds.utils.files import check_writable, explain_os_errors, write_json_atomic
from npp_ds.utils.format import utc_now
from npp_ds.utils.records import git_commit

PUBLISHED_COUNT = 50_000
LOSSY_FORMATS = {"JPEG", "MPO", "WEBP", "GIF", "JPEG2000", "AVIF"}
_VALIDATION = re.compile(r"(?<![a-z])val(idation)?(?![a-z])", re.IGNORECASE)


def find_caveats(images: ImageSet, measured: Measurement, reference: Reference, extractor: Extractor) -> list[str]:
    """Return one sentence for each known reason why the metrics are not comparable; empty if there is none."""
    found = _of_counts(measured, reference, extractor) + _of_reference(measured, reference, extractor)
    found += _of_patch_sides(images.record)
    if lossy := sorted(images.formats & LOSSY_FORMATS):
        found.append(
            f"samples were read from {' and '.join(lossy)} files, which can lose detail: save samples as PNG or .npz"
        )
    if repeated := images.record.get("repeated_images"):
        found.append(f"{repeated} of the samples are copies of others")
    if extractor.name == INCEPTION:
        found += _beside_published(measured, reference, extractor, images.kind == RECONSTRUCTION)
    return found


def _of_counts(measured: Measurement, reference: Reference, extractor: Extractor) -> list[str]:
    counts = (("samples", measured.count), ("reference images", reference.source.num_images))
    return [
        f"{count} {what} are too few for {extractor.feature_dim} features: the covariance is singular and the Frechet "
        "distance too high"
        for what, count in counts
        if count is not None and count <= extractor.feature_dim
    ]


def _of_reference(measured: Measurement, reference: Reference, extractor: Extractor) -> list[str]:
    found, source = [], reference.source
    if source.image_size is not None and source.image_size != measured.image_size:
        sizes = ("x".join(map(str, reversed(size))) for size in (measured.image_size, source.image_size))
        found.append("samples are {} pixels, the reference's images {}".format(*sizes))
    if source.extractor_sha256 not in (None, extractor.sha256):
        found.append(
            f"the reference was made with other weights of {extractor.name} (SHA-256 {source.extractor_sha256[:8]}, "
            f"here {extractor.sha256[:8]}): the distances mean nothing"
        )
    return found


def _of_patch_sides(record: dict[str, Any]) -> list[str]:
    found, side, trained = [], record.get("patch_side", 1), record.get("weights_patch_side")
    if trained not in (None, side):
        found.append(
            f"the images were sampled at patch side {side} from weights of a stage of patch side {trained}: they do "
            "not show what that stage has learned"
        )
    if side > 1:
        found.append(
            f"the samples are of patch side {side}, blocks of one code repeated: not comparable with samples at side "
            "1, nor with published figures"
        )
    return found


def _beside_published(
    measured: Measurement, reference: Reference, extractor: Extractor, reconstruction: bool
) -> list[str]:
    found, count = [], reference.source.num_images
    if not extractor.standard:
        found.append(
            f"Inception's weights are not the standard ones (SHA-256 {extractor.sha256[:8]}): not comparable with any "
            "published figure"
        )
    if measured.count != PUBLISHED_COUNT:
        found.append(f"{measured.count:,} samples, published figures are of {PUBLISHED_COUNT:,}; fewer raise the FID")
    if count is not None and PUBLISHED_COUNT > count > extractor.feature_dim:
        found.append(f"the reference has only {count:,} images, published ones {PUBLISHED_COUNT:,} or more")
    names = (Path(name).as_posix() for name in (reference.path, reference.source.images) if name)
    if not reconstruction and any(_VALIDATION.search("/".join(name.split("/")[-2:])) for name in names):
        found.append("the reference seems to be of validation images; published figures are against training images")
    return found


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
        "kind": images.kind,
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
    what = "reconstructions" if result.get("kind") == RECONSTRUCTION else "samples"
    lines = [f"{result['num_images']:,} {what} of {result['samples_dir']}"]
    lines += [f"against {of} of {result['reference']['path']}, features of {result['extractor']}"]
    lines += [f"  {name:<{width}}  {value:>8}" for _, name, value in rows]
    return "\n".join([*lines, *(f"warning: {text}" for text in result["warnings"])])
