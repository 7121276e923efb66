"""What an extractor of features is, which ones there are, and one pass of it over a set of images."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from npp_ds.errors import UserError
from npp_ds.evaluation.fid import Moments, Statistics
from npp_ds.evaluation.images import ImageSet

Progress = Callable[[int, int], None]
INCEPTION, FASHION_MNIST = "inception", "fashion_mnist"


@dataclass(frozen=True)
class Features:
    """What an extractor says of N images, float32: `pool` [N, d], and where it has them `spatial` [N, s] and class
    `probabilities` [N, C].
    """

    pool: np.ndarray
    spatial: np.ndarray | None = None
    probabilities: np.ndarray | None = None


class Extractor(Protocol):
    """Images to features. `sha256` is that of its weights; `standard` says that they are those everyone else uses.

    `judges_classes`: its class numbers are those of the data set, so that images can be held against their labels.
    """

    name: str
    sha256: str
    standard: bool
    feature_dim: int
    judges_classes: bool
    batch_size: int

    def __call__(self, images: np.ndarray) -> Features:
        """images uint8 [N, H, W, 3]; UserError for a size it cannot take."""
        ...


def load_extractor(name: str, weights: str | Path | None = None, device: str | torch.device | None = None) -> Extractor:
    """The extractor of that name, ready for use. `weights` is a file that stands for Inception's own.

    Raises UserError for an unknown name and for weights that are missing or damaged.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == INCEPTION:
        from npp_ds.evaluation.inception import Inception

        return Inception(weights, device)
    if name == FASHION_MNIST:
        from npp_ds.evaluation.classifier import ClassifierExtractor

        return ClassifierExtractor(device)
    raise UserError(f"extractor: found {name!r}, expected {INCEPTION} or {FASHION_MNIST}")


@dataclass(frozen=True)
class Measurement:
    """One pass over `count` images: their statistics, and features [M, d] of those that were kept, in order.

    `image_size` is [height, width]; `sha256` that of the pixels of all images in order. `predicted` int64 [N] are the
    likeliest classes where the extractor judges them, `probabilities` [N, C] those of images that are scored.
    """

    count: int
    image_size: list[int]
    sha256: str
    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray
    predicted: np.ndarray | None
    probabilities: np.ndarray | None


def measure(
    images: ImageSet, extractor: Extractor, keep: int | None = None, progress: Progress = lambda done, total: None
) -> Measurement:
    """Runs the extractor over all images, in batches. Samples are measured without `keep`, and all is kept of them. Of
    a reference the pool features of `keep` images are kept, evenly spaced, and no probabilities: of ImageNet's training
    images these would take 5 GB.

    Raises UserError for fewer than 2 images.
    """
    wanted = np.arange(images.count)
    if keep is not None and keep < images.count:
        wanted = np.linspace(0, images.count - 1, keep).round().astype(np.int64)
    pool, spatial, digest, done = Moments(), Moments(), hashlib.sha256(), 0
    kept, predicted, probabilities, size = [], [], [], [0, 0]
    for batch in images.batches(extractor.batch_size):
        found = extractor(batch)
        digest.update(np.ascontiguousarray(batch))
        size = list(batch.shape[1:3])
        pool.add(found.pool)
        if found.spatial is not None:
            spatial.add(found.spatial)
        if found.probabilities is not None:
            if extractor.judges_classes:
                predicted.append(found.probabilities.argmax(-1))
            if keep is None:
                probabilities.append(found.probabilities)
        kept.append(found.pool[wanted[(wanted >= done) & (wanted < done + len(batch))] - done])
        done += len(batch)
        progress(done, images.count)
    return Measurement(
        count=done,
        image_size=size,
        sha256=digest.hexdigest(),
        pool=pool.statistics(),
        spatial=spatial.statistics() if spatial.count else None,
        features=np.concatenate(kept),
        predicted=np.concatenate(predicted) if predicted else None,
        probabilities=np.concatenate(probabilities) if probabilities else None,
    )
