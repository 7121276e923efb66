"""The loaders: exactly the batches of the pure order functions, whatever was prefetched, resumed, or went wrong."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from npp_ds.config.schedule import Stage
from npp_ds.data.loader import PREFETCHED_STEPS, EvalLoader, StageLoader
from npp_ds.data.manifest import ShardInfo
from npp_ds.data.order import batch_ids, crop_index, drop_label, rank_slice
from npp_ds.data.store import CodeStore, stage
from npp_ds.errors import UserError
from npp_ds.model.patches import group
from shard_sets import CROP_NAMES, manifest_of, write_set

SAMPLES, SEED, NULL_CLASS = 103, 5, 10


@pytest.fixture(scope="module")
def codes_and_store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loader")
    codes, labels = write_set(directory / "shards", SAMPLES, num_shards=2)
    return codes, labels, stage(directory / "shards", directory / "cache")


@pytest.fixture
def store(codes_and_store):
    return codes_and_store[2]


def make_stage(**changes):
    fields = {
        "index": 1,
        "patch_side": 2,
        "start_step": 7,
        "end_step": 30,
        "start_epoch": 4,
        "steps_per_epoch": 8,
        "batch_size": 12,
        "micro_batch_size": 3,
        "peak_learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup_steps": 1,
        "decay_steps": 1,
    }
    return Stage(**{**fields, **changes})


def make_loader(store, stage=None, **changes):
    fields = {
        "seed": SEED,
        "class_dropout": 0.3,
        "num_classes": NULL_CLASS,
        "rank": 0,
        "world_size": 1,
        "first_step": 7,
    }
    return StageLoader(store, stage or make_stage(), **{**fields, **changes})


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("npp-stage-loader")]


def flatten(batch):
    micro_batches = [(c.tolist(), y.tolist()) for c, y in batch.micro_batches]
    return [batch.step, batch.epoch, batch.ids.tolist(), batch.crops.tolist(), micro_batches]


@pytest.mark.parametrize("patch_side", [1, 2, 4])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (2, 3), (4, 1)])
def test_batches_are_those_of_the_pure_functions(codes_and_store, patch_side, world_size, micro_batch_size):
    codes, labels, store = codes_and_store
    stage = make_stage(patch_side=patch_side, micro_batch_size=micro_batch_size)
    for rank in range(world_size):
        positions = rank_slice(12, world_size, rank, micro_batch_size)
        with make_loader(store, stage, rank=rank, world_size=world_size) as loader:
            steps = 0
            for step, batch in enumerate(loader, start=7):
                epoch, index = 4 + (step - 7) // 8, (step - 7) % 8
                ids = batch_ids(SAMPLES, 12, SEED, epoch, index)[positions]
                assert (batch.step, batch.epoch) == (step, epoch)
                np.testing.assert_array_equal(batch.ids, ids.reshape(-1))
                np.testing.assert_array_equal(batch.crops, crop_index(ids.reshape(-1), SEED, epoch, 3))
                assert len(batch.micro_batches) == len(positions) == 12 // (world_size * micro_batch_size)
                for (got_codes, got_labels), rows in zip(batch.micro_batches, ids, strict=True):
                    crops = crop_index(rows, SEED, epoch, 3)
                    expected = torch.from_numpy(codes[rows, crops].astype(np.int64))
                    assert got_codes.dtype == got_labels.dtype == torch.int64
                    assert got_codes.is_contiguous()
                    assert torch.equal(got_codes, group(expected, patch_side))
                    dropped = drop_label(rows, SEED, epoch, 0.3)
                    assert got_labels.tolist() == np.where(dropped, NULL_CLASS, labels[rows]).tolist()
                steps += 1
        assert steps == 23


def test_resume_at_any_step_gives_the_batches_of_an_uninterrupted_run(store):
    whole = [flatten(batch) for batch in make_loader(store)]
    for first_step in range(7, 31):
        loader = make_loader(store, first_step=first_step)
        assert len(loader) == 30 - first_step
        assert [flatten(batch) for batch in loader] == whole[first_step - 7 :]


def test_prefetched_batches_are_not_overwritten_by_later_ones(store):
    kept = list(make_loader(store))
    assert [flatten(batch) for batch in kept] == [flatten(batch) for batch in make_loader(store)]
    assert len({tuple(batch.micro_batches[0][0].flatten().tolist()) for batch in kept}) == len(kept)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_labels_are_dropped_to_the_null_class_at_the_asked_rate(codes_and_store, rate):
    _, labels, store = codes_and_store
    batches = list(make_loader(store, make_stage(end_step=807), class_dropout=rate))
    given = torch.cat([y for batch in batches for _, y in batch.micro_batches]).numpy()
    ids = np.concatenate([batch.ids for batch in batches])
    dropped = given == NULL_CLASS
    assert dropped.mean() == pytest.approx(rate, abs=0.012)
    np.testing.assert_array_equal(given[~dropped], labels[ids][~dropped])


def test_all_crops_are_drawn(codes_and_store):
    codes, _, store = codes_and_store
    batches = make_loader(store, make_stage(patch_side=1, end_step=807))
    shown = np.zeros(3)
    for batch in batches:
        rows = torch.cat([c for c, _ in batch.micro_batches]).squeeze(2).numpy()
        shown += (codes[batch.ids] == rows[:, None]).all(axis=2).sum(axis=0)
    np.testing.assert_allclose(shown / shown.sum(), 1 / 3, atol=0.02)


@pytest.mark.parametrize("taken", [0, 1, 5, 23])
def test_close_leaves_no_thread(store, taken):
    loader = make_loader(store)
    for _ in range(taken):
        next(loader)
    assert len(threads()) <= 1
    loader.close()
    loader.close()
    assert threads() == []
    assert list(loader) == []


def test_thread_ends_by_itself_with_the_last_step(store):
    assert len(list(make_loader(store))) == 23
    assert threads() == []


def test_thread_runs_ahead_by_a_bounded_number_of_steps(store, monkeypatch):
    loaded = []
    real = StageLoader._load
    monkeypatch.setattr(StageLoader, "_load", lambda self, step: (loaded.append(step), real(self, step))[1])
    with make_loader(store) as loader:
        next(loader)
        deadline = time.monotonic() + 10
        while len(loaded) < PREFETCHED_STEPS + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert loaded == list(range(7, 7 + PREFETCHED_STEPS + 1))
    assert len(loaded) < 2 * PREFETCHED_STEPS


def test_exception_in_the_thread_reaches_the_consumer(store, monkeypatch):
    real = StageLoader._load

    def load(self, step):
        if step == 9:
            raise OSError("the disk is gone")
        return real(self, step)

    monkeypatch.setattr(StageLoader, "_load", load)
    loader = make_loader(store)
    assert [next(loader).step, next(loader).step] == [7, 8]
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)
    assert threads() == []
    assert list(loader) == []


def test_time_spent_waiting_for_data_is_counted(store, monkeypatch):
    real = StageLoader._load
    monkeypatch.setattr(StageLoader, "_load", lambda self, step: (time.sleep(0.05), real(self, step))[1])
    with make_loader(store) as loader:
        for _ in range(3):
            next(loader)
        assert 0.1 < loader.wait_seconds < 5
        waited = loader.wait_seconds
        time.sleep(0.3)
        next(loader)
        assert loader.wait_seconds - waited < 0.05


@pytest.mark.parametrize(
    ("stage_changes", "loader_changes", "message"),
    [
        (
            {"batch_size": 104, "micro_batch_size": 104},
            {},
            "8 steps an epoch, .* 103 samples has 0 batches of 104",
        ),
        ({"steps_per_epoch": 9}, {}, "9 steps an epoch, this training set of 103 samples has 8 batches of 12"),
        ({"patch_side": 3}, {}, "patch_side 3 does not divide the grid of the shards, 4"),
        ({"micro_batch_size": 5}, {}, "batch_size 12 is not a multiple of micro_batch_size 5 x 1"),
        ({}, {"world_size": 8}, "micro_batch_size 3 x 8 processes"),
    ],
)
def test_set_and_stage_that_do_not_fit_are_refused(store, stage_changes, loader_changes, message):
    with pytest.raises(UserError, match=message):
        make_loader(store, make_stage(**stage_changes), **loader_changes)


def eval_rows(store, world_size, micro_batch_size, limit=None, patch_side=2):
    """(codes, label) of the counted rows of all ranks, and the number of batches of each rank."""
    loaders = [EvalLoader(store, patch_side, micro_batch_size, rank, world_size, limit) for rank in range(world_size)]
    rows = []
    for batches in zip(*loaders, strict=True):
        for codes, labels, count in batches:
            assert codes.shape[0] == labels.shape[0] == micro_batch_size
            assert 0 <= count <= micro_batch_size
            rows += list(zip(codes[:count].tolist(), labels[:count].tolist(), strict=True))
    lengths = [len(loader) for loader in loaders]
    assert lengths == [len(list(loader)) for loader in loaders]
    return rows, lengths


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 103), (1, 10), (2, 7), (8, 30)])
def test_evaluation_sees_each_sample_once_in_its_central_crop(codes_and_store, world_size, micro_batch_size):
    codes, labels, store = codes_and_store
    central = torch.from_numpy(codes[:, CROP_NAMES.index("center")].astype(np.int64))
    expected = list(zip(group(central, 2).tolist(), labels.tolist(), strict=True))
    rows, lengths = eval_rows(store, world_size, micro_batch_size)
    assert rows == expected
    assert len(set(lengths)) == 1


@pytest.mark.parametrize("patch_side", [1, 2, 3, 4, 6, 8, 12, 24])
def test_codes_are_grouped_alike_for_every_side_that_divides_the_grid(patch_side):
    codes = np.random.default_rng(0).integers(0, 1000, (5, 3, 576), dtype=np.uint16)
    manifest = manifest_of([ShardInfo(file="a.tar", samples=5, bytes=0, sha256="0" * 64)], grid_size=24)
    (batch,) = EvalLoader(CodeStore(codes, np.arange(5), manifest, Path()), patch_side, 5, 0, 1)
    assert torch.equal(batch[0], group(torch.from_numpy(codes[:, 1].astype(np.int64)), patch_side))


def test_limited_evaluation_is_spread_over_the_set(codes_and_store):
    codes, labels, store = codes_and_store
    rows, _ = eval_rows(store, 2, 4, limit=10, patch_side=1)
    ids = np.arange(10) * SAMPLES // 10
    assert [label for _, label in rows] == labels[ids].tolist()
    assert [np.ravel(shown).tolist() for shown, _ in rows] == codes[ids, 1].tolist()
    assert len(eval_rows(store, 2, 4, limit=10**6)[0]) == SAMPLES
    with pytest.raises(UserError, match="limit 0"):
        EvalLoader(store, 1, 4, 0, 1, limit=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned_where_there_is_cuda(store):
    with make_loader(store) as loader:
        assert all(codes.is_pinned() and labels.is_pinned() for codes, labels in next(loader).micro_batches)


def test_only_the_loader_imports_torch():
    program = "import sys, npp_ds.data.shards, npp_ds.data.store, npp_ds.data.order; print('torch' in sys.modules)"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.stdout == "False\n", result.stderr
