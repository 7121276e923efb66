"""The order of samples: the same on every machine and with every version, and by its statistics a shuffle."""

import hashlib

import numpy as np
import pytest

from npp_ds.data.order import batch_ids, crop_index, drop_label, epoch_permutation, rank_slice
from npp_ds.errors import UserError


def test_batch_that_an_epoch_does_not_have_is_refused():
    assert len(batch_ids(103, 12, 0, 0, 7)) == 12
    for index in (-1, 8):
        with pytest.raises(IndexError, match=f"batch {index} of 8"):
            batch_ids(103, 12, 0, 0, index)


def test_epochs_and_seeds_have_unrelated_orders():
    base = epoch_permutation(5000, 1, 0)
    for other in (epoch_permutation(5000, 1, 1), epoch_permutation(5000, 2, 0)):
        assert (base == other).sum() < 10
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.06


def test_permutation_is_the_one_pinned_here():
    assert epoch_permutation(12, 7, 0).tolist() == [0, 9, 8, 1, 6, 4, 5, 11, 7, 3, 2, 10]
    assert epoch_permutation(12, 7, 1).tolist() == [3, 9, 11, 1, 2, 4, 6, 0, 7, 5, 10, 8]
    imagenet = epoch_permutation(1281167, 0, 299)
    assert imagenet.dtype == np.int64
    assert hashlib.sha256(imagenet.astype("<i8").tobytes()).hexdigest() == (
        "57887d9c1fb65e4f828fb0f744cff3ef156fd1480fc23d14e3e7eeb53f4f62f7"
    )


def test_crops_and_dropped_labels_are_the_ones_pinned_here():
    assert crop_index(np.arange(16), 7, 3, 10).tolist() == [2, 9, 4, 1, 8, 1, 8, 5, 4, 7, 6, 9, 4, 5, 1, 5]
    assert np.flatnonzero(drop_label(np.arange(100), 7, 3, 0.1)).tolist() == [
        4,
        26,
        27,
        33,
        42,
        51,
        54,
        67,
        72,
        76,
        85,
        87,
        95,
    ]


def test_permutation_is_statistically_a_shuffle():
    """Sample i falls on each tenth of the epoch equally often, and neighbours do not stay neighbours."""
    epochs, num_samples = 400, 500
    orders = np.stack([epoch_permutation(num_samples, 11, epoch) for epoch in range(epochs)])
    positions = np.argsort(orders, axis=1)
    counts = np.stack([(positions // 50 == tenth).sum(axis=0) for tenth in range(10)])
    expected = epochs / 10
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = num_samples * 9
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)
    neighbours = (np.abs(np.diff(orders, axis=1)) == 1).mean()
    assert neighbours == pytest.approx(2 / num_samples, rel=0.2)


def test_crops_are_uniform_and_change_between_epochs():
    ids = np.arange(20_000)
    crops = crop_index(ids, 3, 0, 10)
    np.testing.assert_allclose(np.bincount(crops, minlength=10) / len(ids), 0.1, atol=0.01)
    assert (crops == crop_index(ids, 3, 1, 10)).mean() == pytest.approx(0.1, abs=0.01)
    assert set(crop_index(ids, 3, 0, 1).tolist()) == {0}


def test_labels_are_dropped_at_the_asked_rate_independently_of_crop_and_epoch():
    ids = np.arange(50_000)
    dropped = drop_label(ids, 3, 0, 0.1)
    assert dropped.mean() == pytest.approx(0.1, abs=0.006)
    assert drop_label(ids, 3, 1, 0.1)[dropped].mean() == pytest.approx(0.1, abs=0.02)
    assert crop_index(ids, 3, 0, 10)[dropped].mean() == pytest.approx(4.5, abs=0.2)
    assert not drop_label(ids, 3, 0, 0.0).any()
    assert drop_label(ids, 3, 0, 1.0).all()


def test_choices_belong_to_the_sample_not_to_its_position():
    ids = np.arange(1000)
    shuffled = epoch_permutation(1000, 0, 0)
    np.testing.assert_array_equal(crop_index(ids, 4, 2, 10)[shuffled], crop_index(shuffled, 4, 2, 10))
    np.testing.assert_array_equal(drop_label(ids, 4, 2, 0.5)[shuffled], drop_label(shuffled, 4, 2, 0.5))


def test_shared_permutation_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        epoch_permutation(10, 0, 0)[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        batch_ids(10, 5, 0, 0, 0)[0] = 1


def test_sizes_that_do_not_factor_are_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"batch_size 256 .* micro_batch_size 3 x 8 processes"):
        rank_slice(256, 8, 0, 3)
