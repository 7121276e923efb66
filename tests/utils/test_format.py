"""Durations and sizes read the same in every table, line and report; names of files cannot control a terminal."""

import logging

import pytest
from rich.console import Console

from npp_ds.cli.exit_codes import exit_code_of
from npp_ds.errors import UserError
from npp_ds.utils.format import format_bytes, format_duration, make_table, printable
from npp_ds.utils.screen import say


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


HOSTILE = "n\x1b[2J\x9b1m\r\x07\u202e\udc80[red]é"
SURROGATE = r"\udc80"
ESCAPED = r"n\x1b[2J\x9b1m\r\x07\u202e\udc80[red]é"


def test_text_of_a_file_is_printed_with_escapes_in_lines_errors_logs_and_tables(capsys):
    assert printable(HOSTILE) == ESCAPED
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert printable("größe 図 🙂") == "größe 図 🙂"

    def command():
        say(HOSTILE, "second\nline")
        logging.getLogger("npp_ds").warning(
            "of %s", HOSTILE.replace("\udc80", "")
        )  # pytest-xdist reports logs as UTF-8
        Console(width=120).print(make_table(["name"], [[HOSTILE]], title=HOSTILE, totals=[HOSTILE]))
        raise UserError(f"{HOSTILE}:\n  - problem")

    assert exit_code_of(command) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == [ESCAPED, r"second\nline"]
    assert out.count(ESCAPED) == 4
    assert err.splitlines() == [f"WARNING: of {ESCAPED.replace(SURROGATE, '')}", f"error: {ESCAPED}:", "  - problem"]
