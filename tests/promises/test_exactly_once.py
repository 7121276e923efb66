"""Every epoch shows every sample once, but for a tail that differs between epochs, whatever the launch looks like."""

import tempfile
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npp_ds.config.schedule import Stage
from npp_ds.data.loader import StageLoader
from npp_ds.data.manifest import ShardInfo
from npp_ds.data.order import epoch_permutation
from npp_ds.data.store import CodeStore
from npp_ds.data.store import stage as stage_shards
from shard_sets import manifest_of, write_set
from workers import WorkerPool

SEED, CLASSES, CROPS = 3, 10, 3


@st.composite
def launches(draw):
    """(num_samples, stages): one to three stages of a few epochs each, not always whole ones, of mixed batch sizes."""
    num_samples, stages, step, epoch = draw(st.integers(1, 150)), [], 0, 0
    for index, side in enumerate(draw(st.sampled_from([[1], [2, 1], [4, 2, 1]]))):
        batch_size = draw(st.integers(1, min(num_samples, 48)))
        steps_per_epoch = num_samples // batch_size
        steps = draw(st.integers(1, min(3 * steps_per_epoch, 60)))
        stages.append(
            Stage(
                index=index,
                patch_side=side,
                start_step=step,
                end_step=step + steps,
                start_epoch=epoch,
                steps_per_epoch=steps_per_epoch,
                batch_size=batch_size,
                micro_batch_size=batch_size,
                peak_learning_rate=1e-3,
                final_learning_rate=1e-4,
                warmup_steps=0,
                decay_steps=0,
            )
        )
        step, epoch = stages[-1].end_step, stages[-1].end_epoch
    return num_samples, stages


@lru_cache(maxsize=8)
def store_of(num_samples: int) -> CodeStore:
    """Codes that tell sample and crop: every code of crop c of sample i is 3 * i + c; its label is i % 10."""
    ids = np.arange(num_samples)
    rows = (ids[:, None] * CROPS + np.arange(CROPS)).astype(np.uint16)
    codes = np.ascontiguousarray(np.broadcast_to(rows[:, :, None], (num_samples, CROPS, 16)))
    shards = [ShardInfo(file="train-000000.tar", samples=num_samples, bytes=0, sha256="0" * 64)]
    return CodeStore(codes, ids % CLASSES, manifest_of(shards), Path())


def seen(num_samples, stage, world_size=1, micro_batch_size=None, first_step=None):
    """[(step, epoch, [(sample, crop, label) of the global batch in the order of training])], read off the codes."""
    stage = Stage(**{**stage.__dict__, "micro_batch_size": micro_batch_size or stage.batch_size // world_size})
    steps = []
    loaders = [
        StageLoader(
            store_of(num_samples),
            stage,
            seed=SEED,
            class_dropout=0.2,
            num_classes=CLASSES,
            rank=rank,
            world_size=world_size,
            first_step=stage.start_step if first_step is None else first_step,
        )
        for rank in range(world_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    for batches in zip(*loaders, strict=True):
        assert len({(batch.step, batch.epoch) for batch in batches}) == 1
        rows = []
        for micro_step in zip(*(batch.micro_batches for batch in batches), strict=True):
            for codes, labels in micro_step:
                assert (codes == codes[:, :1, :1]).all()
                rows += [(*divmod(int(c), CROPS), int(y)) for c, y in zip(codes[:, 0, 0], labels, strict=True)]
        for rank, batch in enumerate(batches):
            of_rank = torch.cat([codes[:, 0, 0] for codes, _ in batch.micro_batches]).numpy()
            np.testing.assert_array_equal(of_rank, batch.ids * CROPS + batch.crops, err_msg=f"rank {rank}")
        steps.append((batches[0].step, batches[0].epoch, rows))
    return steps


def factors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@settings(max_examples=60, deadline=None)
@given(launch=launches(), data=st.data())
def test_all_ranks_together_see_each_sample_once_an_epoch_whatever_the_split(launch, data):
    num_samples, stages = launch
    for stage in stages:
        world_size = data.draw(st.sampled_from([n for n in factors(stage.batch_size) if n <= 8]), "world size")
        micro_batch_size = data.draw(st.sampled_from(factors(stage.batch_size // world_size)), "micro-batch")
        steps = seen(num_samples, stage, world_size, micro_batch_size)
        assert [step for step, _, _ in steps] == list(range(stage.start_step, stage.end_step))
        assert steps == seen(num_samples, stage), "the global batch depends on the number of processes"
        for epoch in {epoch for _, epoch, _ in steps}:
            samples = [sample for _, e, rows in steps for sample, _, _ in rows if e == epoch]
            assert samples == epoch_permutation(num_samples, SEED, epoch)[: len(samples)].tolist()
            assert len(set(samples)) == len(samples)
            if epoch < stage.end_epoch - 1:
                assert len(samples) == num_samples // stage.batch_size * stage.batch_size


@settings(max_examples=25, deadline=None)
@given(launch=launches(), data=st.data())
def test_resuming_with_another_split_shows_the_rest_and_nothing_twice(launch, data):
    num_samples, stages = launch
    stage = data.draw(st.sampled_from(stages))
    whole = seen(num_samples, stage)
    first_step = data.draw(st.integers(stage.start_step, stage.end_step), "first step")
    world_size = data.draw(st.sampled_from([n for n in factors(stage.batch_size) if n <= 8]), "world size")
    rest = seen(num_samples, stage, world_size, first_step=first_step)
    assert rest == whole[first_step - stage.start_step :]


@settings(max_examples=25, deadline=None)
@given(num_samples=st.integers(20, 150), data=st.data())
def test_samples_that_an_epoch_drops_are_shown_by_later_ones(num_samples, data):
    """With a tail, no two neighbouring epochs of twelve drop the same samples, and each sample is shown by some."""
    batch_size = data.draw(st.integers(2, num_samples // 2).filter(lambda n: num_samples % n >= 3), "batch size")
    steps_per_epoch = num_samples // batch_size
    fields = {"start_step": 0, "end_step": 12 * steps_per_epoch, "start_epoch": 0, "steps_per_epoch": steps_per_epoch}
    sizes = {"batch_size": batch_size, "micro_batch_size": batch_size, "warmup_steps": 0, "decay_steps": 0}
    stage = Stage(index=0, patch_side=1, **fields, **sizes, peak_learning_rate=1.0, final_learning_rate=1.0)
    shown = [set() for _ in range(12)]
    for _, epoch, rows in seen(num_samples, stage):
        shown[epoch].update(sample for sample, _, _ in rows)
    dropped = [frozenset(range(num_samples)) - epoch for epoch in shown]
    assert {len(tail) for tail in dropped} == {num_samples % batch_size}
    assert all(one != other for one, other in pairwise(dropped))
    assert not frozenset.intersection(*dropped)


def steps_of_rank(processes, shards, cache, fields):
    """(steps, ids seen) of this rank; it meets all others after each step, as training does."""
    store = stage_shards(shards, cache)
    ids, steps = [], 0
    options = {"seed": SEED, "class_dropout": 0.1, "num_classes": CLASSES, "first_step": 0}
    with StageLoader(store, Stage(**fields), rank=processes.rank, world_size=processes.world_size, **options) as loader:
        for batch in loader:
            torch.distributed.barrier()
            ids += batch.ids.tolist()
            steps += 1
    return steps, ids


@pytest.mark.slow
@pytest.mark.processes
def test_eight_processes_with_one_shard_end_after_the_same_number_of_steps():
    """103 samples in one shard, batches of 16: two epochs of 6 steps, and each process sees 2 images a step."""
    fields = {
        "index": 0,
        "patch_side": 2,
        "start_step": 0,
        "end_step": 12,
        "start_epoch": 0,
        "steps_per_epoch": 6,
        "batch_size": 16,
        "micro_batch_size": 1,
        "peak_learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup_steps": 0,
        "decay_steps": 0,
    }
    pool = WorkerPool(8)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_set(Path(folder) / "shards", 103, num_shards=1)
            results = pool.run(steps_of_rank, Path(folder) / "shards", Path(folder) / "cache", fields, timeout=150)
    finally:
        pool.stop()
    assert [steps for steps, _ in results] == [12] * 8
    for epoch in (0, 1):
        ids = [sample for _, ids in results for sample in ids[epoch * 12 : (epoch + 1) * 12]]
        assert sorted(ids) == sorted(epoch_permutation(103, SEED, epoch)[:96].tolist())
