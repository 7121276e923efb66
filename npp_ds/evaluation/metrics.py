"""Metrics of sets of images: Frechet distance (FID), precision and recall, Inception score, class agreement.

Each follows ADM's evaluator (github.com/openai/guided-diffusion, evaluations/evaluator.py).
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from npp_ds.errors import UserError

Statistics = tuple[np.ndarray, np.ndarray]  # mean float64 [d], unbiased covariance float64 [d, d]
SPLIT_SIZE = 5000  # images per split of the Inception score
NEIGHBOURS = 3
ROWS = 1024  # whose distances to all others are held at a time: 200 MB for 50,000 images


class Moments:
    """Mean and covariance of rows that arrive in batches; only sums are kept.

    Sums are taken about `center` [d], by default the mean of the first batch, so a mean far from zero costs no digits.
    """

    def __init__(self, center: np.ndarray | None = None) -> None:
        self.count = 0
        self._center: Tensor | None = None
        if center is not None:
            self._begin(torch.as_tensor(center, dtype=torch.float64))

    def _begin(self, center: Tensor) -> Tensor:
        self._center, self._sum = center, torch.zeros_like(center)
        self._products = center.new_zeros(len(center), len(center))
        return center

    def add(self, rows: np.ndarray) -> None:
        """Add rows [n, d] of any float type."""
        values = torch.as_tensor(np.asarray(rows, dtype=np.float64))
        values = values - (self._begin(values.mean(0)) if self._center is None else self._center)
        self._sum += values.sum(0)
        self._products.addmm_(values.T, values)
        self.count += len(values)

    def sum_over_processes(self, device: torch.device) -> None:
        """Add the rows of all processes. All call it together, and all have the same `center`."""
        parts = [self._sum.new_tensor([self.count]), self._sum, self._products.flatten()]
        total = torch.cat(parts).to(device)
        dist.all_reduce(total)
        count, self._sum, products = total.cpu().split([len(part) for part in parts])
        self.count, self._products = round(count.item()), products.view_as(self._products)

    def statistics(self) -> Statistics:
        """Return mean and covariance. Raises UserError for fewer than 2 rows and for numbers that are not finite."""
        if self.count < 2 or self._center is None:
            raise UserError(f"a Frechet distance needs at least 2 images on each side, found {self.count}")
        mean = self._sum / self.count
        covariance = (self._products - torch.outer(self._sum, mean)) / (self.count - 1)
        if not covariance.isfinite().all():
            raise UserError("features: some are not finite numbers; check the images and the extractor's weights")
        return (self._center + mean).numpy(), covariance.numpy()


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson and Landau 1982; FID, arXiv 1706.08500).

    Means [d] and covariances [d, d] are float64. The eigenvalues of A B are taken from the symmetric A^(1/2) B A^(1/2),
    so covariances may be singular.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    difference = mean_a - mean_b
    return float(max(0.0, difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root))


def inception_score(probabilities: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """Return exp of the mean KL divergence of class probabilities [N, C] from their mean (arXiv 1606.03498).

    The score is averaged over splits of `split_size` images in their order; the last split may be smaller.
    """
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size], dtype=np.float64)
        mean = p.mean(axis=0)
        ratio = np.divide(p, mean, out=np.ones_like(p), where=p > 0)
        scores.append(np.exp((p * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(scores))


def class_agreement(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the share of images that the classifier assigns to their requested class, overall and per class number."""
    right = np.asarray(predicted) == np.asarray(labels)
    by_class = {str(c): float(right[labels == c].mean()) for c in np.unique(labels).tolist()}
    return {"class_agreement": float(right.mean()), "class_agreement_by_class": by_class}


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = NEIGHBOURS, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Return (improved precision, improved recall) of pool features [M, d] and [N, d] (arXiv 1904.06991).

    The ball around a feature extends to its `neighbours`-th nearest neighbour in its own set. Precision is the share of
    samples inside a ball of the reference, recall the share of reference images inside a ball of the samples. Raises
    UserError for `neighbours` images or fewer.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    if min(len(reference), len(samples)) <= neighbours:
        raise UserError(
            f"precision and recall need more than {neighbours} images on each side, found {len(samples)} samples and "
            f"{len(reference)} of the reference"
        )
    features = (torch.as_tensor(x).to(device, torch.float32) for x in (samples, reference))
    return calculate_precision_recall_part(*features, neighbours, ROWS)
