"""Shared fixtures; tests that start processes run after all others, tests for a GPU only where there is one."""

from collections.abc import Iterator

import pytest

from workers import WorkerPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: bool({"pair", "tiny_run"} & set(item.fixturenames)) or "processes" in item.keywords)
    for item in items:
        if "gpu" in item.keywords:
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def pair() -> Iterator[WorkerPool]:
    """Two processes joined over gloo."""
    pool = WorkerPool(2)
    yield pool
    pool.stop()
