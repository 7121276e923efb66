"""The data of the study: code shards of the user's images, and the statistics of the real ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from npp_ds.data.manifest import MANIFEST_NAME
from npp_ds.errors import UserError
from npp_ds.evaluation.extractors import Extractor
from npp_ds.evaluation.metrics import Moments, Statistics
from npp_ds.tokenizer import load_tokenizer
from npp_ds.tokenizer.encode import EncodeSettings, Encoding
from npp_ds.tokenizer.sources import Source, load_images, open_source
from npp_ds.utils.files import write_atomic
from studies.claim.plan import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATISTICS_FILE = "real_images.npz"


def parts_of(images: Path, train: int, validation: int) -> Iterator[tuple[str, Source]]:
    """Yield the training, validation and test images: the same number of each class, the first ones of its folder.

    Validation images follow the training images in the folders of `images`/train. All images of `images`/test are test
    images. Raises UserError if there are too few.
    """
    source = open_source([images], "train")
    by_class = [[item for item in source.items if item.label == label] for label in range(source.num_classes)]
    share, held_out = train // source.num_classes, validation // source.num_classes
    if (fewest := min(map(len, by_class))) < share + held_out:
        raise UserError(f"{images}/train: a class has {fewest} images, expected at least {share + held_out}")
    yield "train", replace(source, items=[item for items in by_class for item in items[:share]])
    yield "validation", replace(source, items=[i for items in by_class for i in items[share : share + held_out]])
    yield "test", open_source([images], "test")


def encode(plan: Plan, images: Path, codes: Path) -> None:
    """Encode the images that are not yet; a killed encoding resumes. Raises UserError for what cannot be encoded."""
    if all((codes / name / MANIFEST_NAME).is_file() for name in ("train", "validation", "test")):
        return
    tokenizer, data = load_tokenizer(plan.tokenizer), plan.keys["data"]
    for name, source in parts_of(images, data["train"], data["validation"]):
        settings = EncodeSettings(split=name, image_size=data["image_size"], device=DEVICE)
        encoding = Encoding(source, tokenizer, codes / name, settings)
        encoding.run()
        encoding.finish()


def real_statistics(images: Path, image_size: int, out: Path, extractor: Extractor) -> Statistics:
    """Return mean and covariance of the features of all images in `images`/train, kept in a file in `out`."""
    path = out / STATISTICS_FILE
    if path.is_file():
        with np.load(path) as file:
            if str(file["extractor"]) == extractor.sha256:
                return file["mu"], file["sigma"]
    pixels, _ = load_images(open_source([images], "train"), image_size)
    moments = Moments()
    for start in range(0, len(pixels), extractor.batch_size):
        moments.add(extractor(pixels[start : start + extractor.batch_size]).pool)
    mu, sigma = moments.statistics()
    write_atomic(path, lambda file: np.savez(file, mu=mu, sigma=sigma, extractor=np.array(extractor.sha256)))
    return mu, sigma
