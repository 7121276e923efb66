"""The data of the study: code shards of the user's images, the quality of images, and what quality is possible."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npp_ds.data.manifest import MANIFEST_NAME
from npp_ds.data.store import load_manifest
from npp_ds.errors import UserError
from npp_ds.evaluation.extractors import ClassifierExtractor, Extractor, Inception
from npp_ds.evaluation.metrics import Moments, Statistics, class_agreement, frechet_distance
from npp_ds.tokenizer import load_tokenizer
from npp_ds.tokenizer.encode import EncodeSettings, Encoding
from npp_ds.tokenizer.sources import Source, load_images, open_source
from npp_ds.tokenizer.vq import to_input, to_uint8
from npp_ds.utils.files import sha256, write_atomic, write_json_atomic
from studies.claim.plan import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATISTICS_FILE = "real_images.npz"
DATA_FILE = "data.json"
BATCH = 250
PARTS = ("train", "validation", "test")


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
    if all((codes / name / MANIFEST_NAME).is_file() for name in PARTS):
        found, expected = load_manifest(codes / PARTS[0]).tokenizer.sha256, sha256(plan.tokenizer)
        if found != expected:
            raise UserError(
                f"{codes}: codes of the tokenizer {found[:12]}, expected those of {plan.tokenizer}, {expected[:12]}; "
                "choose another --out"
            )
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


def extractor_of(plan: Plan) -> Extractor:
    """Return what measures the quality of images: the plan's classifier, or Inception."""
    return ClassifierExtractor(DEVICE, plan.classifier) if plan.classifier else Inception(device=DEVICE)


def quality_of(
    batches: Iterable[np.ndarray], labels: np.ndarray, extractor: Extractor, real: Statistics
) -> dict[str, Any]:
    """Return Frechet distance of images to the real ones, and class agreement if the extractor predicts classes.

    `batches` are uint8 [N, H, W, 3] in the order of `labels`, int64 [all images].
    """
    moments, predicted = Moments(center=real[0]), []
    for pixels in batches:
        features = extractor(pixels)
        moments.add(features.pool)
        if extractor.predicts_classes and features.probabilities is not None:
            predicted.append(features.probabilities.argmax(-1))
    found = {"frechet_distance": frechet_distance(*moments.statistics(), *real)}
    if predicted:
        found["class_agreement"] = class_agreement(np.concatenate(predicted), labels)["class_agreement"]
    return found


def measure_data(plan: Plan, images: Path, out: Path) -> None:
    """Measure the test images and their reconstructions as samples are; write data.json beside the results.

    They are as many as a run has samples, the same number of each class.
    """
    size, extractor = plan.keys["data"]["image_size"], extractor_of(plan)
    tokenizer = load_tokenizer(plan.tokenizer).to(DEVICE)
    real = real_statistics(images, size, out, extractor)
    pixels, labels = load_images(open_source([images], "test"), size)
    share = plan.keys["samples"]["images"] // (labels.max() + 1)
    chosen = np.concatenate([np.flatnonzero(labels == label)[:share] for label in range(labels.max() + 1)])
    starts = range(0, len(chosen), BATCH)
    batches = [pixels[chosen[start : start + BATCH]] for start in starts]
    used: set[int] = set()

    def reconstructed() -> Iterator[np.ndarray]:
        for batch in batches:
            codes = tokenizer.encode(to_input(torch.from_numpy(batch).to(DEVICE)))
            used.update(codes.unique().tolist())
            yield to_uint8(tokenizer.decode(codes)).cpu().numpy()

    found = {
        "images": len(chosen),
        "test images": quality_of(batches, labels[chosen], extractor, real),
        "their reconstructions": quality_of(reconstructed(), labels[chosen], extractor, real),
        "codes_used": len(used) / plan.keys["model"]["vocab_size"],
    }
    write_json_atomic(plan.results / DATA_FILE, found)
