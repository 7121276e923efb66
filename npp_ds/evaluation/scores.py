"""Scores of images from what a classifier says of them."""

from typing import Any

import numpy as np

SPLIT_SIZE = 5000  # images per split of the Inception score in ADM's evaluator


def inception_score(probabilities: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """exp of the mean KL divergence of each image's class probabilities [N, C] from their mean (arXiv 1606.03498).

    As in ADM's evaluator it is the mean over splits of `split_size` images in their order, the last one being smaller.
    """
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size], dtype=np.float64)
        mean = p.mean(axis=0)
        ratio = np.divide(p, mean, out=np.ones_like(p), where=p > 0)
        scores.append(np.exp((p * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(scores))


def class_agreement(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Share of images that the classifier takes for the class they were asked to show, over all and by class number."""
    right = np.asarray(predicted) == np.asarray(labels)
    by_class = {str(c): float(right[labels == c].mean()) for c in np.unique(labels).tolist()}
    return {"class_agreement": float(right.mean()), "class_agreement_by_class": by_class}
