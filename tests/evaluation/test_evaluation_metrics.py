"""Frechet distance, precision, recall, Inception score and class agreement equal their definitions and other code."""

import numpy as np
import pytest
from PIL import Image

from extractors import Projection, fidelity_distance, random_images, statistics
from npp_ds.errors import UserError
from npp_ds.evaluation import metrics
from npp_ds.evaluation.metrics import Moments, class_agreement, frechet_distance, inception_score, precision_recall


def test_the_frechet_distance_equals_closed_forms_also_of_singular_covariances():
    rng = np.random.default_rng(0)
    d = 12
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a, b = rng.uniform(0.1, 2, d), rng.uniform(0.1, 2, d)
    shift = rng.standard_normal(d)
    expected = shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(np.zeros(d), (basis * a) @ basis.T, shift, (basis * b) @ basis.T)
    assert found == pytest.approx(expected, rel=1e-9)
    a[3:] = 0
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(shift, (basis * a) @ basis.T, shift, (basis * b) @ basis.T)
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(shift, np.diag(a), shift, np.diag(a)) < 1e-9


@pytest.mark.parametrize("counts", [(300, 200), (9, 7)])
def test_the_frechet_distance_equals_torch_fidelity_s_on_two_folders(counts, tmp_path):
    extractor = Projection()
    sets = [random_images(counts[0], 1, low=60), random_images(counts[1], 2)]
    for number, images in enumerate(sets):
        (tmp_path / str(number)).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / str(number) / f"{i:03d}.png")
    found = frechet_distance(*(part for images in sets for part in statistics(features_of(extractor, images))))
    assert found > 1
    assert found == pytest.approx(fidelity_distance(extractor, tmp_path / "0", tmp_path / "1"), rel=1e-3)


def features_of(extractor, images: np.ndarray) -> np.ndarray:
    return np.concatenate([extractor(images[i : i + 16]).pool for i in range(0, len(images), 16)])


def test_the_frechet_distance_equals_a_float64_matrix_root():
    extractor = Projection()
    (mean_a, cov_a), (mean_b, cov_b) = (
        statistics(features_of(extractor, random_images(count, seed))) for count, seed in ((300, 1), (200, 2))
    )
    root, inverse = cov_a @ cov_b, np.eye(24)
    for _ in range(60):
        root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
    np.testing.assert_allclose(root @ root, cov_a @ cov_b, rtol=1e-6, atol=1e-9)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_statistics_of_batches_are_those_of_the_whole_also_far_from_zero(batch_size):
    rows = (np.random.default_rng(3).standard_normal((50, 6)) + 1e5).astype(np.float32)
    moments = Moments()
    for start in range(0, 50, batch_size):
        moments.add(rows[start : start + batch_size])
    mean, covariance = moments.statistics()
    assert mean.dtype == covariance.dtype == np.float64 and moments.count == 50
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_fewer_than_two_rows_and_numbers_that_are_not_finite_are_refused():
    for rows in (np.zeros((0, 3)), np.zeros((1, 3))):
        with pytest.raises(UserError, match=f"at least 2 images on each side, found {len(rows)}"):
            statistics(rows)
    with pytest.raises(UserError, match="not finite"):
        statistics(np.array([[0.0, 1.0], [np.nan, 2.0]]))


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def radii(points):
        return [
            sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)
        ]

    def share_inside(points, centres):
        balls = list(zip(centres, radii(centres), strict=True))
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in balls) for p in points])

    return share_inside(samples, reference), share_inside(reference, samples)


@pytest.mark.parametrize("rows", [5, 16, 4096])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force_for_any_number_of_rows_at_a_time(k, rows, monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", rows)
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((40, 6)).astype(np.float32)
    samples = (0.8 * rng.standard_normal((23, 6)) + 0.7).astype(np.float32)
    expected = brute_force(reference, samples, k)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(reference, samples, k) == pytest.approx(expected)


def test_narrow_samples_have_high_precision_and_low_recall_and_wide_ones_the_reverse():
    rng = np.random.default_rng(1)
    reference, narrow, wide = (scale * rng.standard_normal((300, 4)) for scale in (1, 0.2, 3))
    precision, recall = precision_recall(reference, narrow)
    assert precision > 0.95 and recall < 0.2
    precision, recall = precision_recall(reference, wide)
    assert precision < 0.5 and recall > 0.9
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference, reference + 100) == (0, 0)


def test_precision_and_recall_need_more_images_than_neighbours():
    with pytest.raises(UserError, match="more than 3 images on each side, found 3 samples and 9 of the reference"):
        precision_recall(np.eye(9), np.eye(9)[:3])


def plain(p: np.ndarray) -> float:
    """ADM's lines: exp of the mean over images of sum p (log p - log mean p)."""
    return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1)))


def test_the_inception_score_is_the_mean_over_splits_in_order():
    logits = 2 * np.random.default_rng(0).standard_normal((25, 6))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert inception_score(p) == pytest.approx(plain(p), rel=1e-12)
    expected = np.mean([plain(p[:10]), plain(p[10:20]), plain(p[20:])])
    assert inception_score(p, split_size=10) == pytest.approx(expected, rel=1e-12)
    assert abs(expected - plain(p)) > 0.1


def test_the_inception_score_is_the_number_of_classes_for_certain_varied_predictions_and_one_for_equal_ones():
    assert inception_score(np.tile(np.eye(7, dtype=np.float32), (3, 1))) == pytest.approx(7)
    assert inception_score(np.full((9, 7), 1 / 7)) == pytest.approx(1)
    assert inception_score(np.repeat(np.eye(7)[:1], 5, axis=0)) == pytest.approx(1)


def test_class_agreement_counts_right_images_over_all_and_by_class():
    labels = np.array([0, 0, 0, 2, 2])
    result = class_agreement(np.array([0, 0, 1, 2, 0]), labels)
    assert result == {"class_agreement": 0.6, "class_agreement_by_class": {"0": 2 / 3, "2": 0.5}}
