"""What samples are compared with: ADM's statistics, statistics made here, or real images measured on the spot."""

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npp_ds.errors import UserError
from npp_ds.evaluation.features import INCEPTION, Extractor, Measurement, Progress, measure
from npp_ds.evaluation.fid import Statistics
from npp_ds.evaluation.images import IMAGES_KEY, ImageSet, open_images
from npp_ds.evaluation.output_paths import try_target, writing
from npp_ds.evaluation.scores import class_agreement
from npp_ds.utils.files import sha256, write_atomic

MANIFOLD_IMAGES = 10_000  # as many as ADM's reference files hold, for precision and recall
POOL_KEYS, SPATIAL_KEYS = ("mu", "sigma"), ("mu_s", "sigma_s")
FEATURES_KEY, METADATA_KEY = "features", "metadata"


@dataclass(frozen=True)
class Source:
    """Where a reference comes from, for results and for the metadata of files made here; None: not known.

    `images` names the images of the statistics, `num_images` is their number, `image_size` [height, width].
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

    `sha256` is that of the file at `path`, or of the pixels in order where images were measured.
    """

    path: str
    sha256: str
    source: Source
    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray | None


def recorded_extractor(path: str | Path) -> str | None:
    """Name of the extractor whose statistics a file holds (ADM's files: Inception); None for images."""
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
    """A reference from an .npz with statistics (ADM's `mu`, `sigma`, and `mu_s`, `sigma_s` where it has them), or from
    any images that `open_images` takes.

    Features are only needed for precision and recall; for ADM's files they cost a pass over their 10,000 images.
    Raises UserError when the statistics are of another extractor.
    """
    if recorded_extractor(path) is None:
        images = open_images(path, image_size)
        measured = measure(images, extractor, MANIFOLD_IMAGES, progress)
        digest = sha256(path) if images.kind == "npz" else measured.sha256
        source = _source_of(images, measured, extractor)
        return Reference(str(path), digest, source, measured.pool, measured.spatial, measured.features)
    return _from_statistics(Path(path), extractor, progress, with_features)


def check_reference(path: str | Path, extractor: Extractor, image_size: int | None = None) -> None:
    """Raises the UserError that `load_reference` would, in seconds: of images no more than the first is read."""
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
    """Measures images once and writes an .npz for later: statistics under ADM's names, features for precision and
    recall, and where they come from. Raises UserError, before it measures, where `out` cannot be written.
    """
    if Path(out).suffix != ".npz":
        raise UserError(f"{out}: found {Path(out).suffix or 'no suffix'}, expected a file name that ends in .npz")
    if recorded_extractor(source) is not None:
        raise UserError(f"{source}: holds statistics already; give images to make a reference of")
    try_target(out)
    made = load_reference(source, extractor, image_size, progress)
    arrays = dict(zip(POOL_KEYS, made.pool, strict=True))
    if made.spatial is not None:
        arrays |= dict(zip(SPATIAL_KEYS, made.spatial, strict=True))
    arrays |= {FEATURES_KEY: made.features, METADATA_KEY: np.array(json.dumps(asdict(made.source)))}
    with writing(out):
        write_atomic(out, lambda file: np.savez(file, **arrays))
    return made


def _source_of(images: ImageSet, measured: Measurement, extractor: Extractor) -> Source:
    from npp_ds import __version__

    agreement = None
    if extractor.judges_classes and images.labels is not None:
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
            f"{path}: statistics of the extractor {source.extractor}, but {extractor.name} is asked for; "
            f"give --extractor {source.extractor} or another reference"
        )
    pool = _statistics(path, content, POOL_KEYS, extractor.feature_dim)
    spatial = _statistics(path, content, SPATIAL_KEYS, None) if SPATIAL_KEYS[0] in content else None
    features = content.get(FEATURES_KEY)
    if with_features and features is None and images:
        features = measure(images, extractor, MANIFOLD_IMAGES, progress).features
    return Reference(str(path), sha256(path), source, pool, spatial, features)


def _read(path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Everything an .npz holds by name; arrays are read only where `wanted`, or small as the metadata is."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] if name in (*wanted, METADATA_KEY) else None for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no readable .npz file ({error}); fetch or make it again") from None


def _metadata(path: Path, text: np.ndarray) -> Source:
    try:
        return Source(**json.loads(str(text)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: {METADATA_KEY} is not what `npp evaluate --make-reference` writes ({error})"
        ) from None


def _statistics(path: Path, content: dict[str, Any], keys: tuple[str, str], dim: int | None) -> Statistics:
    mean, covariance = (content.get(key) for key in keys)
    d = dim or np.size(mean)
    if np.shape(mean) != (d,) or np.shape(covariance) != (d, d):
        found = ", ".join(f"{k} {list(np.shape(content[k])) if k in content else 'missing'}" for k in keys)
        raise UserError(f"{path}: found {found}, expected [{d}] and [{d}, {d}]")
    return np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
