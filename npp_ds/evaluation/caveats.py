"""Reasons why a result is not comparable with others; they are shown on the screen and stored in the result."""

import re
from pathlib import Path
from typing import Any

from npp_ds.evaluation.features import INCEPTION, Extractor, Measurement
from npp_ds.evaluation.images import ImageSet
from npp_ds.evaluation.reference import Reference

PUBLISHED_COUNT = 50_000
_VALIDATION = re.compile(r"(?<![a-z])val(idation)?(?![a-z])", re.IGNORECASE)


def find_caveats(images: ImageSet, measured: Measurement, reference: Reference, extractor: Extractor) -> list[str]:
    """Return one sentence for each known reason why the metrics are not comparable; empty if there is none."""
    found = _of_counts(measured, reference, extractor) + _of_reference(measured, reference, extractor)
    found += _of_patch_sides(images.record)
    if repeated := images.record.get("repeated_images"):
        found.append(f"{repeated} of the samples are copies of others")
    if extractor.name == INCEPTION:
        found += _beside_published(measured, reference, extractor)
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


def _beside_published(measured: Measurement, reference: Reference, extractor: Extractor) -> list[str]:
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
    if any(_VALIDATION.search("/".join(name.split("/")[-2:])) for name in names):
        found.append("the reference seems to be of validation images; published figures are against training images")
    return found
