"""A lock is held by one process at a time, dies with its holder, and is reported where there is none."""

import errno
import multiprocessing
import signal

from npp_ds.utils.locks import locked

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
