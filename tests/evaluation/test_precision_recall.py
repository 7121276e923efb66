"""Precision and recall equal a brute-force reading of their definition, in blocks of any size."""

import numpy as np
import pytest

from npp_ds.errors import UserError
from npp_ds.evaluation.precision_recall import precision_recall


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def radii(points):
        return [
            sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)
        ]

    def share_inside(points, centres):
        balls = list(zip(centres, radii(centres), strict=True))
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in balls) for p in points])

    return share_inside(samples, reference), share_inside(reference, samples)


@pytest.mark.parametrize("block", [5, 16, 4096])
@pytest.mark.parametrize("k", [1, 3])
def test_they_equal_brute_force_whatever_the_blocks(k, block):
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((40, 6)).astype(np.float32)
    samples = (0.8 * rng.standard_normal((23, 6)) + 0.7).astype(np.float32)
    expected = brute_force(reference, samples, k)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(reference, samples, k, block=block) == pytest.approx(expected)


def test_a_narrow_model_is_precise_and_forgets_while_a_wide_one_covers():
    rng = np.random.default_rng(1)
    reference, narrow, wide = (scale * rng.standard_normal((300, 4)) for scale in (1, 0.2, 3))
    precision, recall = precision_recall(reference, narrow)
    assert precision > 0.95 and recall < 0.2
    precision, recall = precision_recall(reference, wide)
    assert precision < 0.5 and recall > 0.9
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference, reference + 100) == (0, 0)


def test_as_many_images_as_neighbours_are_too_few():
    with pytest.raises(UserError, match="more than 3 images on each side, found 3 samples and 9 of the reference"):
        precision_recall(np.eye(9), np.eye(9)[:3])
