"""One display of progress: lines with rate and time left beside a terminal, a bar on one, nothing when it is hidden."""

import re
import sys

from npp_ds.utils import screen as module
from npp_ds.utils.screen import Progress, track


def test_lines_have_rate_facts_and_time_left_and_hidden_progress_has_none(monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    for shown in (True, False):
        with Progress("sampling", shown) as progress:
            progress(4, 8, "1 skipped")
            progress(6, 8, "1 skipped")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "sampling: 4/8 images, 1 skipped", "what is done before the start has no rate"
    assert re.fullmatch(r"sampling: 6/8 images, [\d.e+]+ images/s, 1 skipped, 0\.0 s left", second)


def test_lines_are_seconds_apart(capsys):
    assert list(track(range(1000), "reading", 1000)) == list(range(1000))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_BARS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track("abc", "reading", 3)) == ["a", "b", "c"]
    written = capsys.readouterr().err
    assert "reading" in written and "3/3" in written and "images/s" in written
