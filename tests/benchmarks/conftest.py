"""Benchmarks run in the test's own process, which forks theirs with the imports done."""

import importlib
import json
import sys
from collections.abc import Callable

import pytest

from forks import ON_CPU, fork_context


@pytest.fixture
def run_benchmark(monkeypatch, capsys) -> Callable[..., dict]:
    """Call `main()` of a benchmark whose ways have processes of their own; return the result that it prints."""

    def run(name: str, *arguments: str) -> dict:
        for variable, value in ON_CPU.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        fork_context()
        importlib.import_module(f"benchmarks.{name}").main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run
