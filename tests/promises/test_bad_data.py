"""Training data that cannot be trained on ends a launch on all ranks alike, before anything is written."""

import os

import pytest

from runs import error_of, tiny_config
from shard_sets import manifest_of, write_set

pytestmark = pytest.mark.processes


def too_few(folder):
    write_set(folder / "train", 15, num_shards=1)


def none_at_all(folder):
    write_set(folder / "train", 15, num_shards=1)
    manifest_of([]).save(folder / "train")


def damaged(folder):
    write_set(folder / "train", 40, num_shards=2)
    os.truncate(folder / "train" / "train-000001.tar", 10_000)


def unfinished(folder):
    write_set(folder / "train", 40, num_shards=2)
    (folder / "train" / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (too_few, "schedule.batch_size: 16 (every stage) exceeds the 15 training images; lower it"),
        (none_at_all, "train: holds no samples; expected at least one"),
        (damaged, "train-000001.tar: found 10000 bytes, expected"),
        (unfinished, "manifest.json: No such file or directory; expected the manifest of a folder of code shards"),
    ],
)
def test_bad_training_data_is_one_error_on_all_ranks_and_no_run_folder(pair, tmp_path, prepare, message):
    prepare(tmp_path)
    told = pair.run(error_of, tiny_config(tmp_path, tmp_path / "run", data={"val": None}))
    assert told[0] == told[1]
    assert message in told[0]
    assert not (tmp_path / "run").exists()
