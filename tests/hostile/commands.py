"""Commands on bad input: each must end soon, in little memory, with one line that says what is wrong."""

import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

from forks import run_forked, run_main

MEMORY = 2 << 30


def run_limited(*words: str | Path, program: str = "npp_ds.cli", seconds: float = 20, **options) -> CompletedProcess:
    """Run `npp WORDS`, or another program (a module or a script), as `forks.run_forked` does, in limited memory.

    More than `seconds` raise subprocess.TimeoutExpired; more than MEMORY bytes are a MemoryError of the command.
    """
    return run_forked(program, *words, timeout=seconds, main=run_in_limited_memory, **options)


def run_in_limited_memory(program: str, *words: str) -> None:
    """Call `forks.run_main` with at most MEMORY more bytes of address space than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGESIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    run_main(program, *words)


def assert_refused(
    *words: str | Path, phrase: str = "", seconds: float = 20, program: str = "npp_ds.cli",
    environment: Mapping[str, str] = os.environ, folder: Path | None = None,
) -> str:  # fmt: skip
    """Assert that a command fails within `seconds` with one error that holds `phrase`; return its standard error.

    The error is one line, or a line and a list of problems under it. Neither a traceback nor a control character, such
    as an escape sequence from a file, may reach the terminal.
    """
    done = run_limited(*words, program=program, seconds=seconds, environment=environment, folder=folder)
    text = done.stdout + done.stderr
    assert done.returncode not in (0, None), f"accepted:\n{text}"
    assert done.returncode > 0, f"killed by signal {-done.returncode}:\n{text}"
    assert "Traceback" not in text, text
    assert len(re.findall(r"^error\b", done.stderr, re.MULTILINE | re.IGNORECASE)) == 1, f"not one error:\n{text}"
    assert phrase in done.stderr, f"{phrase!r} not in:\n{text}"
    assert_printable(text)
    return done.stderr


def assert_printable(text: str) -> None:
    """Assert that printed text holds no control characters but those of lines and columns."""
    assert not (found := re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)), f"{found} in {text!r}"
