"""The Frechet distance between two sets of features, in float64: of Inception's pool features it is the FID."""

import numpy as np
import torch
import torch.distributed as dist

from npp_ds.errors import UserError

Statistics = tuple[np.ndarray, np.ndarray]  # mean float64 [d], unbiased covariance float64 [d, d]


class Moments:
    """Mean and covariance of rows that arrive in batches: nothing but sums is kept.

    Sums are taken about `center` [d], by default the first batch's mean, so that a mean far from zero costs no digits.
    """

    def __init__(self, center: np.ndarray | None = None) -> None:
        self.count = 0
        self._center: torch.Tensor | None = None
        if center is not None:
            self._begin(torch.as_tensor(center, dtype=torch.float64))

    def _begin(self, center: torch.Tensor) -> None:
        self._center, self._sum = center, torch.zeros_like(center)
        self._products = center.new_zeros(len(center), len(center))

    def add(self, rows: np.ndarray) -> None:
        """Takes in rows [n, d] of any float type."""
        rows = torch.as_tensor(np.asarray(rows, dtype=np.float64))
        if self._center is None:
            self._begin(rows.mean(0))
        rows = rows - self._center
        self._sum += rows.sum(0)
        self._products.addmm_(rows.T, rows)
        self.count += len(rows)

    def sum_over_processes(self, device: torch.device) -> None:
        """Takes in the rows of all processes, whose `center` is the same; called by all of them together."""
        parts = [self._sum.new_tensor([self.count]), self._sum, self._products.flatten()]
        total = torch.cat(parts).to(device)
        dist.all_reduce(total)
        count, self._sum, products = total.cpu().split([len(part) for part in parts])
        self.count, self._products = round(count.item()), products.view_as(self._products)

    def statistics(self) -> Statistics:
        """Raises UserError for fewer than 2 rows, and for rows that were not finite."""
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 images on each side, found {self.count}")
        mean = self._sum / self.count
        covariance = (self._products - torch.outer(self._sum, mean)) / (self.count - 1)
        if not covariance.isfinite().all():
            raise UserError("features: some are not finite numbers; look at the images and the extractor's weights")
        return (self._center + mean).numpy(), covariance.numpy()


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) in float64 (Dowson and Landau 1982; FID, arXiv 1706.08500).

    The eigenvalues of A B are taken from the symmetric A^(1/2) B A^(1/2), so covariances may be singular.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    difference = mean_a - mean_b
    return float(max(0.0, difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root))
