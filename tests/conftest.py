"""Shared fixtures and the order of the tests; tests for a GPU run only where there is one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import WATCHED, Outcome, outcome_of, run, shards_in, tiny_config
from workers import WorkerPool


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run quick tests first; under pytest-xdist last, so that its workers finish at about the same time."""

    def starts_processes(item: pytest.Item) -> bool:
        return "pair" in item.fixturenames or item.get_closest_marker("processes") is not None

    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, starts_processes(item)), reverse=True)
    else:
        items.sort(key=starts_processes)
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords would count a folder of that name too
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def pair() -> Iterator[WorkerPool]:
    """Two processes joined over gloo."""
    pool = WorkerPool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def pools(pair: WorkerPool) -> Iterator[dict[int, WorkerPool]]:
    """Worlds of 1, 2, 3 and 4 processes, started when they are first used."""
    others = {size: WorkerPool(size) for size in (1, 3, 4)}
    yield {2: pair, **others}
    for pool in others.values():
        pool.stop()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """The folder of `runs.shards_in`."""
    return shards_in(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def undisturbed(pair, shards, tmp_path_factory) -> Outcome:
    """What a run of two processes with dropout, average and sample log leaves behind when nothing interrupts it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    pair.run(run, tiny_config(shards, folder, **WATCHED))
    return outcome_of(folder)
