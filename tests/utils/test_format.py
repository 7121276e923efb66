"""Durations and sizes read the same in every table, line and report."""

import pytest

from npp_ds.utils.format import format_bytes, format_duration


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.5, "0.5 s"),
        (59.94, "59.9 s"),
        (65, "1:05 min"),
        (3599, "59:59 min"),
        (7325, "2:02:05"),
        (2 * 86400 + 60, "2 days, 0:01:00"),
    ],
)
def test_durations_are_readable(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0.0 kB"),
        (43_000, "43.0 kB"),
        (18_500_000, "18.5 MB"),
        (6.6e9, "6.6 GB"),
        (2.5e13, "25,000.0 GB"),
        (-2e6, "-2.0 MB"),
    ],
)
def test_sizes_are_readable(number, text):
    assert format_bytes(number) == text
