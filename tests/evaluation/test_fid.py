"""The Frechet distance equals closed forms and torch-fidelity's, also where covariances are singular."""

import numpy as np
import pytest
from PIL import Image

from extractors import Projection, fidelity_distance, random_images, statistics
from npp_ds.errors import UserError
from npp_ds.evaluation.fid import Moments, frechet_distance


def test_it_equals_closed_forms_also_of_singular_covariances():
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
def test_it_equals_torch_fidelity_s_on_two_folders(counts, tmp_path):
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


def test_it_equals_a_float64_matrix_root():
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
def test_statistics_of_batches_are_those_of_the_whole_however_far_from_zero(batch_size):
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
