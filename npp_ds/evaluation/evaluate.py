"""Samples against a reference: its statistics, every metric, caveats of the comparison, and one JSON of it all.

A reference is an .npz of statistics (ADM's, or made here), or real images that are measured now.
"""

import json
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npp_ds import __version__
from npp_ds.errors import UserError
from npp_ds.evaluation.extractors import (
    FASHION_MNIST,
    INCEPTION,
    Extractor,
    Measurement,
    Progress,
    load_extractor,
    measure,
)
from npp_ds.evaluation.images import IMAGES_KEY, RECONSTRUCTION, ImageSet, open_images
from npp_ds.evaluation.metrics import (
    NEIGHBOURS,
    Statistics,
    class_agreement,
    frechet_distance,
    inception_score,
    precision_recall,
)
from npp_ds.sampling.folder import EVALUATION_FILE
from npp_ds.utils.files import (
    check_writable,
    explain_os_errors,
    open_regular,
    parse_json,
    sha256,
    write_atomic,
    write_json_atomic,
)
from npp_ds.utils.format import utc_now
from npp_ds.utils.records import git_commit

AUTO = "auto"
PUBLISHED_COUNT = 50_000
LOSSY_FORMATS = {"JPEG", "MPO", "WEBP", "GIF", "JPEG2000", "AVIF"}
_VALIDATION = re.compile(r"(?<![a-z])val(idation)?(?![a-z])", re.IGNORECASE)
LARGEST_ARRAY = 1 << 30  # bytes
MANIFOLD_IMAGES = 10_000  # for precision and recall; the number of images in ADM's reference files
POOL_KEYS, SPATIAL_KEYS = ("mu", "sigma"), ("mu_s", "sigma_s")
FEATURES_KEY, METADATA_KEY = "features", "metadata"


@dataclass(frozen=True)
class Source:
    """The origin of a reference, for results and for the metadata of files made here; None means unknown.

    `images` names the images of the statistics, `num_images` is their number, `image_size` is [height, width].
    `extractor_sha256` is that of the extractor's weights.
    """

    images: str | None
    num_images: int | None
    image_size: list[int] | None
    extractor: str
    extractor_sha256: str | None
    pixels_sha256: str | None = None
    class_agreement: float | None = None
    created_by: str | None = None


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, and pool features [M, d] of some of them for precision and recall.

    `sha256` is that of the file at `path`, or of the pixels in order if images were measured.
    """

    path: str
    sha256: str
    source: Source
    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray | None


def recorded_extractor(path: str | Path) -> str | None:
    """Return the name of the extractor that made the statistics in a file (Inception for ADM's), None for images."""
    if Path(path).suffix != ".npz":
        return None
    content = _read(Path(path), ())
    if METADATA_KEY in content:
        return _metadata(Path(path), content[METADATA_KEY]).extractor
    return INCEPTION if POOL_KEYS[0] in content else None


def load_reference(
    path: str | Path,
    extractor: Extractor,
    image_size: int | None = None,
    progress: Progress = lambda done, total: None,
    with_features: bool = True,
) -> Reference:
    """Load a reference from an .npz with statistics, or measure any images that `open_images` takes.

    Statistics are `mu` and `sigma`, and optionally `mu_s` and `sigma_s`, as in ADM's files. `with_features` loads the
    features for precision and recall; for ADM's files this is a pass over their 10,000 images. Raises UserError if
    another extractor made the statistics.
    """
    if recorded_extractor(path) is None:
        images = open_images(path, image_size)
        measured = measure(images, extractor, MANIFOLD_IMAGES, progress)
        digest = sha256(path) if images.kind == "npz" else measured.sha256
        source = _source_of(images, measured, extractor)
        return Reference(str(path), digest, source, measured.pool, measured.spatial, measured.features)
    return _from_statistics(Path(path), extractor, progress, with_features)


def check_reference(path: str | Path, extractor: Extractor, image_size: int | None = None) -> None:
    """Raise the UserError that `load_reference` would raise, within seconds: of images only the first is read."""
    if recorded_extractor(path) is None:
        next(open_images(path, image_size).batches(1))
    else:
        load_reference(path, extractor, with_features=False)


def make_reference(
    out: str | Path,
    source: str | Path,
    extractor: Extractor,
    image_size: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Reference:
    """Measure images and write a reference .npz: statistics under ADM's names, features, and their origin.

    Raises UserError, before it measures, if `out` cannot be written.
    """
    if Path(out).suffix != ".npz":
        raise UserError(f"{out}: found {Path(out).suffix or 'no suffix'}, expected a file name that ends in .npz")
    if recorded_extractor(source) is not None:
        raise UserError(f"{source}: holds statistics already; give images to make a reference from")
    check_writable(out)
    made = load_reference(source, extractor, image_size, progress)
    arrays: dict[str, Any] = dict(zip(POOL_KEYS, made.pool, strict=True))
    if made.spatial is not None:
        arrays |= dict(zip(SPATIAL_KEYS, made.spatial, strict=True))
    arrays |= {FEATURES_KEY: made.features, METADATA_KEY: np.array(json.dumps(asdict(made.source)))}
    with explain_os_errors(out):
        write_atomic(out, lambda file: np.savez(file, **arrays))
    return made


def _source_of(images: ImageSet, measured: Measurement, extractor: Extractor) -> Source:
    agreement = None
    if measured.predicted is not None and images.labels is not None:
        agreement = class_agreement(measured.predicted, images.labels)["class_agreement"]
    return Source(
        images=images.path,
        num_images=measured.count,
        image_size=measured.image_size,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        pixels_sha256=measured.sha256,
        class_agreement=agreement,
        created_by=f"npp_ds {__version__}",
    )


def _from_statistics(path: Path, extractor: Extractor, progress: Progress, with_features: bool) -> Reference:
    content = _read(path, (*POOL_KEYS, *SPATIAL_KEYS, *([FEATURES_KEY] if with_features else [])))
    images = open_images(path) if IMAGES_KEY in content else None
    if METADATA_KEY in content:
        source = _metadata(path, content[METADATA_KEY])
    else:
        size = list(next(images.batches(1)).shape[1:3]) if images else None
        source = Source(None, None, size, INCEPTION, None)
    if source.extractor != extractor.name:
        raise UserError(
            f"{path}: statistics of the extractor {source.extractor}, but {extractor.name} was requested; "
            f"give --extractor {source.extractor} or another reference"
        )
    pool = _statistics(path, content, POOL_KEYS, extractor.feature_dim)
    spatial = _statistics(path, content, SPATIAL_KEYS, None) if SPATIAL_KEYS[0] in content else None
    features = content.get(FEATURES_KEY)
    if with_features and features is None and images:
        features = measure(images, extractor, MANIFOLD_IMAGES, progress).features
    return Reference(str(path), sha256(path), source, pool, spatial, features)


def _read(path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Return the arrays of an .npz by name. Those not `wanted` are None, except the metadata."""
    content: dict[str, Any] = {}
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                content[name] = None
                if name in (*wanted, METADATA_KEY):
                    if entry.file_size > LARGEST_ARRAY:
                        raise ValueError(f"{name} has {entry.file_size:,} bytes, expected at most {LARGEST_ARRAY:,}")
                    with archive.open(entry) as data:
                        content[name] = np.lib.format.read_array(data, allow_pickle=False)
    except Exception as error:  # zipfile, its decompressors and numpy raise many kinds for damaged files
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: no readable .npz file ({reason:.200}); fetch or make it again") from None
    return content


def _metadata(path: Path, text: np.ndarray) -> Source:
    try:
        return Source(**parse_json(str(text)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: {METADATA_KEY} is not what `npp evaluate --make-reference` writes ({error})"
        ) from None


def _statistics(path: Path, content: dict[str, Any], keys: tuple[str, str], dim: int | None) -> Statistics:
    mean, covariance = (content.get(key, ()) for key in keys)
    d = dim or np.size(mean)
    if np.shape(mean) != (d,) or np.shape(covariance) != (d, d):
        found = ", ".join(f"{k} {list(np.shape(content[k])) if k in content else 'missing'}" for k in keys)
        raise UserError(f"{path}: found {found}, expected [{d}] and [{d}, {d}]")
    return np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)


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
    spatial statistics, `inception_score`, `precision`, `recall`, and `class_agreement` if the extractor predicts
    classes.
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


def find_caveats(images: ImageSet, measured: Measurement, reference: Reference, extractor: Extractor) -> list[str]:
    """Return one sentence for each known reason why the metrics are not comparable; empty if there is none."""
    found = _of_reference(measured, reference, extractor) + _of_patch_sides(images.record)
    if lossy := sorted(images.formats & LOSSY_FORMATS):
        found.append(
            f"samples were read from {' and '.join(lossy)} files, which can lose detail: save samples as PNG or .npz"
        )
    if measured.repeated and images.kind != RECONSTRUCTION:
        found.append(f"{measured.repeated} of the samples are copies of others")
    if extractor.name == INCEPTION:
        found += _beside_published(measured, reference, extractor, images.kind == RECONSTRUCTION)
    return found


def _of_reference(measured: Measurement, reference: Reference, extractor: Extractor) -> list[str]:
    source = reference.source
    found = [
        f"{count} {what} are too few for {extractor.feature_dim} features: the covariance is singular and the Frechet "
        "distance too high"
        for what, count in (("samples", measured.count), ("reference images", source.num_images))
        if count is not None and count <= extractor.feature_dim
    ]
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
