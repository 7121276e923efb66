"""Processes that stage sets of shards at once, hang in the middle, are killed; what they leave in the cache folder."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from npp_ds.data.store import stage

SPAWN = multiprocessing.get_context("spawn")
PATIENCE = 60


def start(target, *args):
    process = SPAWN.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def finish(*processes):
    """Exit codes of processes that must end within the time limit."""
    for process in processes:
        process.join(timeout=PATIENCE)
    return [process.exitcode for process in processes]


def entries(cache):
    """Names in the cache folder apart from locks."""
    return sorted(name for name in os.listdir(cache) if not name.endswith(".lock"))


@contextmanager
def each_shard_read(action: Callable[[int], None]) -> Iterator[None]:
    """Meanwhile, a thread that has read a shard calls `action(samples read so far)`."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            action(record.args[1])

    logger, handler = logging.getLogger("npp_ds.data.shards"), Handler()
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def stage_and_report(shards, cache, barrier, results):
    unpacked = []
    barrier.wait(timeout=PATIENCE)
    with each_shard_read(unpacked.append):
        store = stage(shards, cache)
    results.put((int(store.codes.sum(dtype=np.int64)), store.labels.tolist(), unpacked))


def stage_and_hang(shards, cache, halfway):
    """Stages until the first shard is read, then waits to be killed."""

    def hang(done):
        halfway.set()
        signal.pause()

    with each_shard_read(hang):
        stage(shards, cache)


def hang_halfway(shards, cache):
    halfway = SPAWN.Event()
    process = start(stage_and_hang, shards, cache, halfway)
    assert halfway.wait(timeout=PATIENCE)
    return process


def kill(process):
    process.kill()
    assert finish(process) == [-signal.SIGKILL]


def assert_holds(store, codes, labels):
    np.testing.assert_array_equal(store.codes, codes)
    np.testing.assert_array_equal(store.labels, labels)
