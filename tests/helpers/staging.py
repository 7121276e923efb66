"""Processes that stage sets of shards at once, hang in the middle, are killed; what they leave in the cache folder."""

import multiprocessing
import os
import signal

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


def stage_and_report(shards, cache, barrier, results):
    unpacked = []
    barrier.wait(timeout=PATIENCE)
    store = stage(shards, cache, progress=lambda done, total: unpacked.append(done))
    results.put((int(store.codes.sum(dtype=np.int64)), store.labels.tolist(), unpacked))


def stage_and_hang(shards, cache, halfway):
    """Stages until the first shard is unpacked, then waits for its death."""

    def hang(done, total):
        halfway.set()
        signal.pause()

    stage(shards, cache, progress=hang)


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
