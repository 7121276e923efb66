"""Small files are read whole only if they are regular, not too large, and parsed safely; locks die with holders."""

import errno
import json
import multiprocessing
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from npp_ds.checkpoint.folders import RECORD, CheckpointRecord, IncompleteCheckpointError, _digest, read_record
from npp_ds.utils.files import locked, parse_json, plain_name, read_json, read_small


def test_only_regular_files_of_a_limited_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"[1.5]")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert read_small(tmp_path / "file") == b"[1.5]"
    assert read_json(tmp_path / "file") == [1.5]
    for name, reason in {
        "fifo": "Not a regular file", "zero": "Not a regular file", "sparse": "Larger than the 67,108,864 bytes",
        ".": "Is a directory", "absent": "No such file",
    }.items():  # fmt: skip
        with pytest.raises(OSError, match=reason) as caught:
            read_small(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    with pytest.raises(OSError, match="Larger than the 100 bytes"):
        read_small(Path("/proc/self/maps"), limit=100)  # a file whose size is said to be 0


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\xfe\xfd", b"1e400", b"-1e999", b"9" * 5000, b"{"])
def test_bad_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "a\\b", "/a", "a\0", "a\n", "a\x1b[2J", "é" * 128])
def test_only_plain_file_names_of_a_folder_are_taken_from_files(tmp_path, name):
    assert plain_name("rank-00000-of-00002 é.safetensors")
    with pytest.raises(ValueError, match="expected a plain file name"):
        plain_name(name)
    content = asdict(CheckpointRecord(1, 0, 1, 1, "fp32", "", "", 1, [], {})) | {"files": {name: {}}}
    (tmp_path / RECORD).write_text(json.dumps({**content, "sha256": _digest(content)}))
    with pytest.raises(IncompleteCheckpointError, match="expected a plain file name"):
        read_record(tmp_path)


SPAWN = multiprocessing.get_context("spawn")
PATIENCE = 60


def hold(path, held):
    with locked(path, create_folder=True):
        held.set()
        signal.pause()


def test_a_lock_is_had_once_its_holder_is_killed(tmp_path):
    path, held = tmp_path / "folder" / "lock", SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(path, held), daemon=True)
    process.start()
    assert held.wait(timeout=PATIENCE)
    with locked(path, patience=0.05) as had:
        assert not had
    process.kill()
    process.join(timeout=PATIENCE)
    with locked(path) as had:
        assert had


def test_content_of_a_locked_file_is_kept_and_missing_locks_are_reported(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / "lock").write_text("content")
    with locked(tmp_path / "lock") as had:
        assert not had
    assert (tmp_path / "lock").read_text() == "content"
