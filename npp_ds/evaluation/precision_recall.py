"""Improved precision and recall (arXiv 1904.06991) as ADM's evaluator takes them: on pool features, with k = 3."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from npp_ds.errors import UserError

NEIGHBOURS = 3
BLOCK = 4096  # rows and columns of the distances held at a time: 64 MiB of float32


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    neighbours: int = NEIGHBOURS,
    device: str | torch.device = "cpu",
    block: int = BLOCK,
) -> tuple[float, float]:
    """Features [M, d] and [N, d] -> (precision, recall).

    Around each feature lies a ball that reaches to its `neighbours`-th nearest neighbour in its own set. Precision is
    the share of samples inside some ball of the reference, recall that of reference images inside some ball of the
    samples. Raises UserError for `neighbours` images or fewer.
    """
    if min(len(reference), len(samples)) <= neighbours:
        raise UserError(
            f"precision and recall need more than {neighbours} images on each side, found {len(samples)} samples and "
            f"{len(reference)} of the reference"
        )
    a, b = (torch.as_tensor(x).to(device, torch.float32) for x in (reference, samples))
    radii_a, radii_b = (_squared_radii(x, neighbours, block) for x in (a, b))
    a_inside, b_inside = (torch.zeros(len(x), dtype=torch.bool, device=device) for x in (a, b))
    for rows, columns, distances in _squared_distances(a, b, block):
        a_inside[rows] |= (distances <= radii_b[columns]).any(1)
        b_inside[columns] |= (distances <= radii_a[rows, None]).any(0)
    return b_inside.double().mean().item(), a_inside.double().mean().item()


def _squared_radii(features: Tensor, neighbours: int, block: int) -> Tensor:
    """float32 [N]: the squared distance from each row to its `neighbours`-th nearest among the others.

    The row itself is the nearest of all, so the one wanted is the smallest but `neighbours`.
    """
    nearest = features.new_full((len(features), neighbours + 1), torch.inf)
    for rows, _, distances in _squared_distances(features, features, block):
        smallest = distances.topk(min(neighbours + 1, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], smallest], 1).topk(neighbours + 1, largest=False).values
    return nearest.amax(1)


def _squared_distances(a: Tensor, b: Tensor, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, squared distances float32 between them) of all blocks."""
    norms_a, norms_b = (x.square().sum(1) for x in (a, b))
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            products = a[rows] @ b[columns].T
            yield rows, columns, (norms_a[rows, None] - 2 * products + norms_b[columns]).clamp_(min=0)
