"""A loss far above the last ones of its stage is a spike; nothing else is."""

import math

import pytest

from npp_ds.training.loss_checks import SpikeRule


def flagged(rule: SpikeRule, losses: list[float], stage: int = 0) -> list[int]:
    return [i for i, loss in enumerate(losses) if rule.observe(stage, loss) is not None]


def test_a_loss_above_the_threshold_is_a_spike_with_the_numbers_it_stands_out_from():
    rule = SpikeRule(window=4, threshold=3.0)
    assert flagged(rule, [1.0, 3.0, 1.0, 3.0]) == []  # mean 2, standard deviation 1
    spike = rule.observe(0, 5.01)
    assert (spike.loss, spike.mean, spike.std) == (5.01, 2.0, 1.0)


@pytest.mark.parametrize("loss", [5.0, 2.0, -50.0])
def test_a_loss_at_the_threshold_or_below_is_none(loss):
    rule = SpikeRule(window=4, threshold=3.0)
    assert flagged(rule, [1.0, 3.0, 1.0, 3.0, loss]) == []


def test_a_spike_does_not_enter_the_window():
    rule = SpikeRule(window=4, threshold=3.0)
    assert flagged(rule, [1.0, 3.0, 1.0, 3.0, 100.0, 100.0, 5.01, 2.0]) == [4, 5, 6]


def test_the_window_forgets_what_is_older():
    rule = SpikeRule(window=4, threshold=3.0)
    assert flagged(rule, [9.0, 9.0, 9.0, 9.0, 1.0, 3.0, 1.0, 3.0, 5.01]) == [8]


def test_half_a_window_of_the_stage_must_be_seen_first():
    assert flagged(SpikeRule(window=6, threshold=3.0), [1.0, 1.0, 50.0, 1.0, 1.0]) == []
    assert flagged(SpikeRule(window=6, threshold=3.0), [1.0, 1.0, 1.0, 50.0, 1.0]) == [3]
    assert flagged(SpikeRule(window=1, threshold=3.0), [50.0, 60.0]) == [1]


def test_a_stage_is_judged_by_its_own_losses():
    rule = SpikeRule(window=4, threshold=3.0)
    assert flagged(rule, [1.0, 1.1, 1.0, 1.1], stage=0) == []
    assert flagged(rule, [7.0, 7.1, 7.0, 9.0], stage=1) == [3]


def test_a_constant_loss_does_not_make_rounding_a_spike():
    for loss, spikes in ((2.0 + 1e-6, []), (2.009, []), (2.011, [8])):  # the least standard deviation is 0.002
        assert flagged(SpikeRule(window=8, threshold=5.0), [2.0] * 8 + [loss]) == spikes


def test_losses_that_are_no_numbers_are_neither_spikes_nor_remembered():
    rule = SpikeRule(window=4, threshold=3.0)
    assert flagged(rule, [1.0, 3.0, math.nan, math.inf, 1.0, -math.inf, 3.0, 5.0, 5.01]) == []
    assert flagged(rule, [1.0, 1.0, 1.0, 1.0, math.nan, 2.0]) == [5]


def test_a_window_of_zero_is_off():
    assert flagged(SpikeRule(window=0, threshold=3.0), [1.0] * 100 + [1e9]) == []
