"""Inception score by its plain formula, and class agreement."""

import numpy as np
import pytest

from npp_ds.evaluation.scores import class_agreement, inception_score


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


def test_sure_and_varied_answers_score_the_number_of_classes_and_equal_ones_score_one():
    assert inception_score(np.tile(np.eye(7, dtype=np.float32), (3, 1))) == pytest.approx(7)
    assert inception_score(np.full((9, 7), 1 / 7)) == pytest.approx(1)
    assert inception_score(np.repeat(np.eye(7)[:1], 5, axis=0)) == pytest.approx(1)


def test_class_agreement_counts_right_images_over_all_and_by_class():
    labels = np.array([0, 0, 0, 2, 2])
    result = class_agreement(np.array([0, 0, 1, 2, 0]), labels)
    assert result == {"class_agreement": 0.6, "class_agreement_by_class": {"0": 2 / 3, "2": 0.5}}
