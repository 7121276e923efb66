"""The reference of a comparison: statistics of ADM, statistics made by npp_ds, or real images measured now."""

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npp_ds import __version__
from npp_ds.errors import UserError
from npp_ds.evaluation.extractors import INCEPTION, Extractor, Measurement, Progress, measure
from npp_ds.evaluation.images import IMAGES_KEY, ImageSet, open_images
from npp_ds.evaluation.metrics import Statistics, class_agreement
from npp_ds.utils.files import check_writable, explain_os_errors, open_regular, parse_json, sha256, write_atomic

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
