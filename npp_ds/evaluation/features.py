"""Features of images: the interface of an extractor, and one pass of an extractor over a set of images."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from npp_ds.evaluation.images import ImageSet
from npp_ds.evaluation.metrics import Moments, Statistics

Progress = Callable[[int, int], None]
INCEPTION, FASHION_MNIST = "inception", "fashion_mnist"


@dataclass(frozen=True)
class Features:
    """The features of N images, float32: `pool` [N, d], and from some extractors `spatial` [N, s] and class
    `probabilities` [N, C].
    """

    pool: np.ndarray
    spatial: np.ndarray | None = None
    probabilities: np.ndarray | None = None


class Extractor(Protocol):
    """A network that maps images to features.

    `sha256` is that of its weights; `standard` says whether these are the weights that published results use.
    `judges_classes` says whether its class numbers are those of the data set, so that predictions can be compared with
    labels.
    """

    name: str
    sha256: str
    standard: bool
    feature_dim: int
    judges_classes: bool
    batch_size: int

    def __call__(self, images: np.ndarray) -> Features:
        """Return the features of images uint8 [N, H, W, 3]. Raises UserError for a size that it does not support."""
        ...


@dataclass(frozen=True)
class Measurement:
    """The result of one pass over `count` images of `image_size` [height, width].

    `sha256` is that of the pixels of all images in order. `pool` and `spatial` are statistics of all images, `features`
    [M, d] the pool features of the kept images in order. `predicted` int64 [N] holds the likeliest classes if the
    extractor judges them, `probabilities` [N, C] the class probabilities if they are scored.
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
    """Run the extractor over all images in batches.

    Samples are measured without `keep`: all their features and probabilities are kept. For a reference the pool
    features of `keep` evenly spaced images are kept, and no probabilities: those of ImageNet's training images would
    take 5 GB. Raises UserError for fewer than 2 images.
    """
    wanted = np.arange(images.count)
    if keep is not None and keep < images.count:
        wanted = np.linspace(0, images.count - 1, keep).round().astype(np.int64)
    pool, spatial, digest, done = Moments(), Moments(), hashlib.sha256(), 0
    kept: list[np.ndarray] = []
    predicted: list[np.ndarray] = []
    probabilities: list[np.ndarray] = []
    size = [0, 0]
    for batch in images.batches(extractor.batch_size):
        found = extractor(batch)
        digest.update(np.ascontiguousarray(batch).data)
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
