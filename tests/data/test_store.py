"""Staging: once per node, by many processes at once, never half, never stale, never writable."""

import logging
import os
import re
import shutil
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from npp_ds.data import staged_set
from npp_ds.data import store as store_module
from npp_ds.data.manifest import Manifest
from npp_ds.data.store import _locked, available_manifest, stage
from npp_ds.errors import UserError
from shard_sets import files_limited_to, manifest_of, write_set
from staging import (
    PATIENCE,
    SPAWN,
    assert_holds,
    each_shard_read,
    entries,
    finish,
    hang_halfway,
    kill,
    stage_and_report,
    start,
)


def test_mapped_array_equals_the_shards_and_is_read_only(tmp_path):
    codes, labels = write_set(tmp_path / "shards", 50, num_shards=3)
    store = stage(tmp_path / "shards", tmp_path / "cache")
    assert_holds(store, codes, labels)
    assert (store.codes.dtype, store.codes.shape, store.labels.dtype) == (np.uint16, (50, 3, 16), np.int64)
    assert store.codes.flags.c_contiguous
    assert len(store) == 50
    assert store.manifest == Manifest.load(tmp_path / "shards")
    for array in (store.codes, store.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    for name in ("codes.npy", "labels.npy"):
        assert stat.S_IMODE((store.folder / name).stat().st_mode) == 0o444


def test_processes_that_stage_at_once_unpack_once(tmp_path):
    codes, labels = write_set(tmp_path / "shards", 400, num_shards=4)
    barrier, results = SPAWN.Barrier(4), SPAWN.Queue()
    processes = [start(stage_and_report, tmp_path / "shards", tmp_path / "cache", barrier, results) for _ in range(4)]
    reports = [results.get(timeout=PATIENCE) for _ in processes]
    assert finish(*processes) == [0] * 4
    assert {report[0] for report in reports} == {int(codes.sum(dtype=np.int64))}
    assert all(report[1] == labels.tolist() for report in reports)
    assert sorted(report[2] for report in reports) == [[], [], [], [100, 200, 300, 400]]


def test_what_a_killed_stager_left_is_never_used(tmp_path):
    codes, labels = write_set(tmp_path / "shards", 90, num_shards=3)
    kill(hang_halfway(tmp_path / "shards", tmp_path / "cache"))
    name = Manifest.load(tmp_path / "shards").fingerprint()
    assert entries(tmp_path / "cache") == [f"{name}.tmp"]
    assert_holds(stage(tmp_path / "shards", tmp_path / "cache"), codes, labels)
    assert entries(tmp_path / "cache") == [name]


def test_waiting_process_takes_over_from_a_killed_one(tmp_path):
    codes, _ = write_set(tmp_path / "shards", 90, num_shards=3)
    barrier, results = SPAWN.Barrier(2), SPAWN.Queue()
    first = hang_halfway(tmp_path / "shards", tmp_path / "cache")
    second = start(stage_and_report, tmp_path / "shards", tmp_path / "cache", barrier, results)
    barrier.wait(timeout=PATIENCE)
    second.join(timeout=0.5)
    assert second.is_alive()
    kill(first)
    assert finish(second) == [0]
    assert results.get(timeout=PATIENCE)[0::2] == (int(codes.sum(dtype=np.int64)), [30, 60, 90])


def test_leftovers_of_other_sets_are_removed_unless_their_stager_lives(tmp_path):
    for number, name in enumerate(("dead", "alive", "ours")):
        write_set(tmp_path / name, 20, num_shards=2, seed=number)
    kill(hang_halfway(tmp_path / "dead", tmp_path / "cache"))
    process = hang_halfway(tmp_path / "alive", tmp_path / "cache")
    stage(tmp_path / "ours", tmp_path / "cache")
    alive, ours = (Manifest.load(tmp_path / name).fingerprint() for name in ("alive", "ours"))
    assert entries(tmp_path / "cache") == sorted([f"{alive}.tmp", ours])
    kill(process)


def test_leftovers_of_another_user_stop_nobody(tmp_path, monkeypatch):
    write_set(tmp_path / "shards", 20)
    theirs = tmp_path / "cache" / f"{'a' * 64}.tmp"
    theirs.mkdir(parents=True)
    os.chown(theirs, 12345, 12345) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr("npp_ds.data.store.check_owner", lambda *_: None)
    stage(tmp_path / "shards", tmp_path / "cache")
    assert theirs.is_dir()


def test_a_failure_to_read_another_copy_of_a_set_is_not_shared(tmp_path):
    write_set(tmp_path / "good", 20)
    shutil.copytree(tmp_path / "good", tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "train-000000.tar", 9000)
    name = Manifest.load(tmp_path / "good").fingerprint()
    begun, found = threading.Event(), []

    def fail():
        with pytest.raises(UserError), _locked(tmp_path, name, str(tmp_path / "damaged")):
            begun.set()
            time.sleep(0.3)
            raise UserError("damaged")

    def wait():
        with _locked(tmp_path, name, str(tmp_path / "good")):
            found.append(name)

    threads = [threading.Thread(target=target) for target in (fail, wait)]
    threads[0].start()
    assert begun.wait(timeout=PATIENCE)
    threads[1].start()
    for thread in threads:
        thread.join(timeout=PATIENCE)
    assert found == [name]


def test_changed_manifest_restages_and_leaves_old_maps_alone(tmp_path):
    old_codes, old_labels = write_set(tmp_path / "shards", 40)
    old = stage(tmp_path / "shards", tmp_path / "cache")
    codes, labels = write_set(tmp_path / "shards", 40, seed=1)
    assert not np.array_equal(codes, old_codes)
    assert_holds(stage(tmp_path / "shards", tmp_path / "cache"), codes, labels)
    assert_holds(old, old_codes, old_labels)


def test_restaging_of_changed_shards_is_logged_once_by_the_process_that_does_it(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "npp_ds")

    def logged_while_staging(name):
        caplog.clear()
        stage(name, tmp_path / "cache")
        assert all(record.any_rank for record in caplog.records)
        return caplog.messages

    write_set(tmp_path / "shards", 40)
    write_set(tmp_path / "others", 40, seed=2)
    assert logged_while_staging(tmp_path / "shards") == logged_while_staging(tmp_path / "others") == []
    old = Manifest.load(tmp_path / "shards").fingerprint()
    write_set(tmp_path / "shards", 40, seed=1)
    monkeypatch.chdir(tmp_path)
    (line,) = logged_while_staging("shards")
    assert (
        f"{tmp_path / 'shards'}: the shards have changed since they were staged in {tmp_path / 'cache' / old}" in line
    )
    assert logged_while_staging("shards") == []
    (stage("shards", tmp_path / "cache").folder / "codes.npy").unlink()
    assert len(logged_while_staging("shards")) == 1, "the earlier copy is still there"


def test_damaged_copy_of_unchanged_shards_is_no_change(tmp_path, caplog):
    write_set(tmp_path / "shards", 40)
    (stage(tmp_path / "shards", tmp_path / "cache").folder / "codes.npy").unlink()
    caplog.set_level(logging.INFO, "npp_ds")
    stage(tmp_path / "shards", tmp_path / "cache")
    assert caplog.messages == []


def test_available_manifest_is_that_of_the_folder_else_of_the_copy_staged_last(tmp_path):
    write_set(tmp_path / "shards", 40)
    stage(tmp_path / "shards", tmp_path / "cache")
    write_set(tmp_path / "shards", 30)
    assert available_manifest(tmp_path / "shards", tmp_path / "cache").num_samples == 30
    (tmp_path / "shards" / "manifest.json").unlink()
    assert available_manifest(tmp_path / "shards", tmp_path / "cache").num_samples == 40
    write_set(tmp_path / "shards", 30)
    newest = stage(tmp_path / "shards", tmp_path / "cache").folder
    (tmp_path / "shards" / "manifest.json").unlink()
    os.utime(newest, (0, 0))  # as a copy of the cache may have it
    assert available_manifest(tmp_path / "shards", tmp_path / "cache").num_samples == 30
    assert available_manifest(tmp_path / "others", tmp_path / "cache") is None


def test_variables_in_paths_are_those_of_the_machine_that_reads_them(tmp_path, monkeypatch):
    codes, labels = write_set(tmp_path / "node-7" / "shards", 20, num_shards=1)
    monkeypatch.setenv("NODE", "node-7")
    path, cache = f"{tmp_path}/$NODE/shards", f"{tmp_path}/${{NODE}}/cache"
    assert_holds(stage(path, cache), codes, labels)
    assert stage(tmp_path / "node-7" / "shards", tmp_path / "node-7" / "cache").folder.is_relative_to(
        tmp_path / "node-7"
    )
    assert available_manifest(path) == Manifest.load(tmp_path / "node-7" / "shards")
    monkeypatch.setenv("NODE", "node-8")
    with pytest.raises(UserError, match="node-8/shards"):
        stage(path, cache)


def test_staged_set_is_opened_without_reading_the_shards(tmp_path):
    codes, labels = write_set(tmp_path / "shards", 40)
    stage(tmp_path / "shards", tmp_path / "cache")
    (tmp_path / "shards" / "train-000000.tar").unlink()
    assert_holds(stage(tmp_path / "shards", tmp_path / "cache"), codes, labels)


def test_processes_that_start_at_once_read_the_arrays_once_and_the_next_start_again(tmp_path, monkeypatch):
    codes, labels = write_set(tmp_path / "shards", 40)
    stage(tmp_path / "shards", tmp_path / "cache")
    read, together, verify, load = [], threading.Barrier(4), staged_set._verify, store_module.load_manifest
    monkeypatch.setattr(staged_set, "_verify", lambda *arguments: (read.append(1), verify(*arguments)))

    def load_together(shard_dir):
        together.wait(timeout=PATIENCE)
        return load(shard_dir)

    monkeypatch.setattr(store_module, "load_manifest", load_together)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: stage(tmp_path / "shards", tmp_path / "cache"), range(4)))
    for store in stores:
        assert_holds(store, codes, labels)
    assert len(read) == 2  # codes and labels
    monkeypatch.setattr(store_module, "load_manifest", load)
    stage(tmp_path / "shards", tmp_path / "cache")
    assert len(read) == 4


@pytest.mark.parametrize("name", ["codes.npy", "labels.npy"])
@pytest.mark.parametrize("size", [None, 0, 100, 200])
def test_cut_or_missing_cache_file_is_staged_again(tmp_path, name, size):
    codes, labels = write_set(tmp_path / "shards", 40)
    path = stage(tmp_path / "shards", tmp_path / "cache").folder / name
    path.unlink() if size is None else os.truncate(path, size)
    assert_holds(stage(tmp_path / "shards", tmp_path / "cache"), codes, labels)


def flip(path):
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)


def lower(**limits):
    """Lowers limits in the manifest, so that what the shards hold is out of range."""
    return lambda path: Manifest.load(path.parent).model_copy(update=limits).save(path.parent)


def repeat_first_shard(path):
    shutil.copy(path.with_name("train-000000.tar"), path)
    first, second = Manifest.load(path.parent).shards
    manifest_of([first, first.model_copy(update={"file": second.file})]).save(path.parent)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip, r"train-000001\.tar: found SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}; tokenize this shard again"),
        (lambda path: os.truncate(path, 9000), r"train-000001\.tar: found 9000 bytes, expected \d+; tokenize this"),
        (os.unlink, r"train-000001\.tar: No such file or directory; tokenize this shard again"),
        (lower(vocab_size=998), r"train-00000\d\.tar, key 'n.*/image_.*': code 99\d out of range, expected below 998"),
        (lower(num_classes=9), r"train-00000\d\.tar, key 'n.*/image_.*': label 9 out of range, expected below 9"),
        (lower(grid_size=2), r"key 'n.*/image_00000': codes are \[3, 16\], expected \[3, 4\]"),
        (repeat_first_shard, r"train-000001\.tar, key 'n.*/image_00000': duplicate key, already in train-000000\.tar"),
    ],
    ids=["flipped", "truncated", "missing", "codes", "labels", "grid", "duplicates"],
)
def test_bad_set_is_refused_by_file_and_key_and_nothing_is_left(tmp_path, spoil, message):
    write_set(tmp_path / "shards", 40, num_shards=2)
    spoil(tmp_path / "shards" / "train-000001.tar")
    with pytest.raises(UserError, match=f"{message}.*`npp shards verify {tmp_path / 'shards'}` lists every problem"):
        stage(tmp_path / "shards", tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_failure_is_shared_by_those_who_waited_and_not_by_later_starts(tmp_path):
    write_set(tmp_path / "shards", 40, num_shards=2)
    content = (tmp_path / "shards" / "train-000001.tar").read_bytes()
    os.truncate(tmp_path / "shards" / "train-000001.tar", 9000)
    halfway, resume, errors, read = threading.Event(), threading.Event(), [], []

    def call():
        with pytest.raises(UserError) as error:
            stage(tmp_path / "shards", tmp_path / "cache")
        errors.append(str(error.value))

    def first_one_waits(done):
        if threading.current_thread() is not calls[0]:
            read.append(done)
            return
        halfway.set()
        assert resume.wait(timeout=PATIENCE)

    calls = [threading.Thread(target=call) for _ in range(3)]
    with each_shard_read(first_one_waits):
        calls[0].start()
        assert halfway.wait(timeout=PATIENCE)
        for thread in calls[1:]:
            thread.start()
            thread.join(timeout=0.2)
        resume.set()
        for thread in calls:
            thread.join(timeout=PATIENCE)
        assert len(errors) == 3
        assert len(set(errors)) == 1
        assert "train-000001.tar: found 9000 bytes" in errors[0]
        assert read == []
        call()
        assert read == [20]
    (tmp_path / "shards" / "train-000001.tar").write_bytes(content)
    assert len(stage(tmp_path / "shards", tmp_path / "cache")) == 40


def test_empty_or_missing_set_is_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json"):
        stage(tmp_path / "shards", tmp_path / "cache")
    manifest_of([]).save(tmp_path / "shards")
    with pytest.raises(UserError, match="holds no samples"):
        stage(tmp_path / "shards", tmp_path / "cache")


def test_full_disk_is_an_error_that_names_the_need_and_leaves_nothing(tmp_path):
    write_set(tmp_path / "shards", 40)
    with pytest.raises(UserError, match=r"while staging .*shards \(4,160 bytes\)"), files_limited_to(2000):
        stage(tmp_path / "shards", tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_too_small_disk_is_refused_before_unpacking(tmp_path, monkeypatch):
    write_set(tmp_path / "shards", 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4159))
    with pytest.raises(UserError, match="4,159 bytes free, 4,160 needed"):
        stage(tmp_path / "shards", tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4160))
    assert len(stage(tmp_path / "shards", tmp_path / "cache")) == 40


def test_disk_that_another_process_filled_with_the_same_set_is_not_too_small(tmp_path, monkeypatch):
    write_set(tmp_path / "shards", 40)
    cache, halfway, resume, stores = tmp_path / "cache", threading.Event(), threading.Event(), []
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if any(cache.glob("*/codes.npy")) else 4160)
    )

    def wait(done):
        halfway.set()
        assert resume.wait(timeout=PATIENCE)

    first, second = (
        threading.Thread(target=lambda: stores.append(stage(tmp_path / "shards", cache))) for _ in range(2)
    )
    with each_shard_read(wait):
        first.start()
        assert halfway.wait(timeout=PATIENCE)
        second.start()
        second.join(timeout=0.3)
        resume.set()
        for thread in (first, second):
            thread.join(timeout=PATIENCE)
    assert [len(store) for store in stores] == [40, 40]


def test_cache_that_cannot_be_made_is_named(tmp_path):
    write_set(tmp_path / "shards", 40)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache: Not a directory"):
        stage(tmp_path / "shards", tmp_path / "file" / "cache")


@pytest.fixture
def default_caches(tmp_path, monkeypatch):
    """Stand-ins for /dev/shm and ~/.cache: (this user's folder in shared memory, the fallback)."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(store_module, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write_set(tmp_path / "shards", 40)
    return tmp_path / "shm" / f"npp_ds-{os.getuid()}", tmp_path / "home" / "npp_ds"


def test_shared_memory_is_the_default_when_it_has_room(tmp_path, monkeypatch, default_caches):
    shared, home = default_caches
    free = {shared: 2 * 4160, home: 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    assert stage(tmp_path / "shards").folder.parent == shared
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700
    assert not home.exists()


def test_home_is_the_default_when_shared_memory_is_short(tmp_path, monkeypatch, default_caches):
    shared, home = default_caches
    free = {shared: 2 * 4160 - 1, tmp_path: 10**9}  # the disk of `home`, which is not there yet
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    assert stage(tmp_path / "shards").folder.parent == home
    free[shared] = 10**9
    assert stage(tmp_path / "shards").folder.parent == home
    assert entries(shared) == []


def test_foreign_folder_in_shared_memory_is_not_trusted(tmp_path, default_caches):
    shared, home = default_caches
    (tmp_path / "foreign").mkdir()
    shared.symlink_to(tmp_path / "foreign")
    assert stage(tmp_path / "shards").folder.parent == home
    assert os.listdir(tmp_path / "foreign") == []


def overwrite(name, offset, content):
    """Changes bytes of a staged file in place, as another process of this user could."""

    def spoil(folder):
        (folder / name).chmod(0o644)
        with (folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(content)
        (folder / name).chmod(0o444)

    return spoil


def link_outside(folder):
    copy = shutil.copy(folder / "codes.npy", folder.parent / "copy")
    (folder / "codes.npy").unlink()
    (folder / "codes.npy").symlink_to(copy)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (overwrite("codes.npy", 1000, b"\x01\x00"), "codes.npy: found SHA-256 .*; staging the set anew"),
        (overwrite("codes.npy", 1000, b"\xff\xff"), "codes.npy: holds values outside of 0 to 999; staging"),
        (overwrite("labels.npy", 135, b"\xff"), "labels.npy: holds values outside of 0 to 9; staging the set anew"),
        (overwrite("record.json", 0, b"[[["), None),
        (lambda folder: (folder / "record.json").unlink(), None),
        (lambda folder: folder.chmod(0o775), None),
        (lambda folder: (folder / "codes.npy").chmod(0o646), None),
        (link_outside, None),
    ],
    ids=["bit", "code", "label", "record", "earlier version", "shared folder", "shared file", "link"],
)
def test_staged_copy_that_changed_or_that_others_may_change_is_staged_anew(tmp_path, caplog, spoil, message):
    codes, labels = write_set(tmp_path / "shards", 40)
    folder = stage(tmp_path / "shards", tmp_path / "cache").folder
    spoil(folder)
    with each_shard_read(lambda done: read.append(done)):
        read = []
        assert_holds(stage(tmp_path / "shards", tmp_path / "cache"), codes, labels)
    assert read == [40]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(set(warnings)) == bool(message)
    assert all(re.search(message, warning) for warning in warnings)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


@pytest.mark.skipif(os.getuid() != 0, reason="gives files to another user")
@pytest.mark.parametrize("name", ["", "codes.npy", ".lock", ".download"])
def test_what_another_user_put_into_a_shared_cache_is_refused(tmp_path, monkeypatch, name):
    write_set(tmp_path / "shards", 40)
    folder = stage(tmp_path / "shards", tmp_path / "cache").folder
    path = folder / name if not name.startswith(".") else folder.with_suffix(name)
    if name == ".lock":
        shutil.rmtree(folder)
    if name == ".download":
        shutil.rmtree(folder)
        path.mkdir()
        monkeypatch.setattr(store_module.remote, "is_remote", lambda source: True)
        monkeypatch.setattr(store_module.remote, "load_manifest", lambda source: Manifest.load(tmp_path / "shards"))
    os.chown(path, 12345, 12345)
    with pytest.raises(UserError, match=f"^{path}: belongs to the user 12345, expected this one, 0.*data.cache_dir"):
        stage(str(tmp_path / "shards"), tmp_path / "cache")


def test_lock_that_is_a_link_does_not_empty_its_target(tmp_path):
    write_set(tmp_path / "shards", 40)
    (tmp_path / "cache").mkdir()
    (tmp_path / "thesis").write_text("years of work")
    lock = tmp_path / "cache" / f"{Manifest.load(tmp_path / 'shards').fingerprint()}.lock"
    for link in (lock.symlink_to, lock.hardlink_to):
        link(tmp_path / "thesis")
        with pytest.raises(UserError, match=rf"^{lock}: .* while staging"):
            stage(tmp_path / "shards", tmp_path / "cache")
        assert (tmp_path / "thesis").read_text() == "years of work"
        lock.unlink()


def test_folders_that_are_no_leftovers_of_staging_stay(tmp_path):
    write_set(tmp_path / "shards", 40)
    (tmp_path / "cache" / "thesis.tmp").mkdir(parents=True)
    stage(tmp_path / "shards", tmp_path / "cache")
    assert "thesis.tmp" in os.listdir(tmp_path / "cache")
