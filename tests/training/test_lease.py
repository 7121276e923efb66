"""Two starts on one run folder never both commit: the second is refused, or the older one learns that it has lost."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from npp_ds.errors import UserError
from npp_ds.training import lease as lease_module
from npp_ds.training.lease import Lease, LeaseLostError
from runs import logs

pytestmark = pytest.mark.processes

HEARTBEAT = 0.1


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def _serve(connection: Connection) -> None:
    """A start of a run that does as it is told: (method, arguments) -> (outcome, what was said)."""
    lease = None

    def act(name: str, *args: Any, **keys: Any) -> Any:
        nonlocal lease
        if name == "new":
            lease = Lease(*args, heartbeat_seconds=HEARTBEAT, **keys)
        elif name == "without_locks":
            lease_module.locked = _no_lock
        elif name == "allow_files_of":
            resource.setrlimit(resource.RLIMIT_FSIZE, (args[0], -1))
        elif name == "acquire":
            with logs() as lines:
                lease.acquire()
            said.extend(lines)
        else:
            value = getattr(lease, name)
            return value() if callable(value) else value
        return lease and lease.token

    while True:
        said: list[str] = []
        try:
            name, args, keys = connection.recv()
        except EOFError:
            return
        try:
            connection.send((act(name, *args, **keys), said))
        except Exception as error:
            connection.send((error, said))


@contextmanager
def _no_lock(path: Path, patience: float) -> Iterator[bool]:
    yield False


class Start:
    """A process that may hold leases."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, name: str, *args: Any, **keys: Any) -> None:
        self._connection.send((name, args, keys))

    def answer(self) -> tuple[Any, list[str]]:
        assert self._connection.poll(30), "no answer in 30 s"
        return self._connection.recv()

    def ask(self, name: str, *args: Any, **keys: Any) -> Any:
        self.tell(name, *args, **keys)
        outcome, _ = self.answer()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self._connection.close()


@pytest.fixture
def start() -> Iterator[Any]:
    started: list[Start] = []

    def new(*args: Any, **keys: Any) -> Start:
        started.append(Start())
        if args:
            started[-1].ask("new", *args, **keys)
        return started[-1]

    yield new
    for process in started:
        process.end()


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lease.json").read_text())


def wait_for(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.02)


@contextmanager
def taken(folder: Path, **keys: Any) -> Iterator[Lease]:
    """A lease of this process."""
    lease = Lease(folder, heartbeat_seconds=HEARTBEAT, **keys)
    with logs() as lease.said:
        lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def test_the_file_says_who_holds_the_folder_and_its_beat_moves(start, tmp_path):
    folder = tmp_path / "new" / "run"
    holder = start(folder, host="node7", job_id="4711", restart_count=2)
    token = holder.ask("acquire")
    found = record(folder)
    assert {key: found[key] for key in ("token", "host", "pid", "job_id", "restart_count", "released")} == {
        "token": token, "host": "node7", "pid": holder.process.pid, "job_id": "4711", "restart_count": 2,
        "released": False,
    }  # fmt: skip
    wait_for(lambda: record(folder)["beat"] >= found["beat"] + 3)
    assert holder.ask("check") is None and holder.ask("lost") is False


def test_slurm_names_job_and_restart(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with taken(tmp_path):
        assert (record(tmp_path)["job_id"], record(tmp_path)["restart_count"]) == ("99", 3)


@pytest.mark.parametrize("host", [None, "othernode"])
def test_a_second_start_is_refused_while_the_first_lives(start, tmp_path, host):
    first = start(tmp_path)
    token = first.ask("acquire")
    second = Lease(tmp_path, heartbeat_seconds=HEARTBEAT, stale_seconds=30, host=host)
    with logs() as said, pytest.raises(UserError) as caught:
        second.acquire()
    text = str(caught.value)
    assert f"pid {first.process.pid}" in text and record(tmp_path)["host"] in text and "since 20" in text
    assert str(tmp_path) in text and "run_dir" in text
    assert len(said) == 1 and "watching" in said[0]
    second.release()
    assert record(tmp_path)["token"] == token and first.ask("check") is None


def test_the_next_start_takes_the_folder_of_a_killed_one_at_once(start, tmp_path):
    first = start(tmp_path)
    first.ask("acquire")
    first.signal(signal.SIGKILL)  # not waited for: it stays a zombie, as under a launcher that is slow to look
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
    began = time.monotonic()
    with taken(tmp_path, stale_seconds=60) as lease:
        assert time.monotonic() - began < 5
        assert record(tmp_path)["token"] == lease.token
        assert len(lease.said) == 1 and "has ended" in lease.said[0]


def test_a_reused_pid_is_not_taken_for_the_holder(tmp_path):
    with taken(tmp_path):
        left = record(tmp_path)
    left.update(token="of one before", process_started=left["process_started"] - 1, released=False)
    (tmp_path / "lease.json").write_text(json.dumps(left))  # this pid, but another process
    began = time.monotonic()
    with taken(tmp_path, stale_seconds=60):
        assert time.monotonic() - began < 5


def test_a_dead_pid_on_a_host_of_the_same_name_proves_nothing(start, tmp_path):
    first = start(tmp_path)
    first.ask("acquire")
    first.end()
    left = record(tmp_path)
    (tmp_path / "lease.json").write_text(json.dumps({**left, "machine": "another boot"}))
    began = time.monotonic()
    with taken(tmp_path, stale_seconds=1.0):
        assert 1.0 <= time.monotonic() - began < 10


def test_another_node_takes_from_a_frozen_holder_which_then_stays_out(start, tmp_path):
    first = start(tmp_path, host="node1")
    first.ask("acquire")
    first.signal(signal.SIGSTOP)
    began = time.monotonic()
    with taken(tmp_path, stale_seconds=1.5, host="node2") as lease:
        assert 1.5 <= time.monotonic() - began < 15
        assert "watching" in lease.said[0] and "silent for 1.5 s" in lease.said[1] and len(lease.said) == 2
        first.signal(signal.SIGCONT)
        with pytest.raises(LeaseLostError) as caught:
            first.ask("check")
        assert f"host node2, pid {os.getpid()}" in str(caught.value)
        beat = record(tmp_path)["beat"]
        wait_for(lambda: record(tmp_path)["beat"] >= beat + 5)
        assert record(tmp_path)["token"] == lease.token
        assert first.ask("release") is None
        assert record(tmp_path)["token"] == lease.token and record(tmp_path)["released"] is False
        lease.check()
        assert not lease.lost


def test_the_heartbeat_alone_finds_out_that_the_lease_is_lost(start, tmp_path):
    first = start(tmp_path, job_id="5")
    first.ask("acquire")
    with taken(tmp_path, job_id="5", restart_count=1):
        wait_for(lambda: first.ask("lost"))


@pytest.mark.parametrize("locks", [True, False])
def test_a_holder_suspended_between_its_look_and_its_write_does_not_come_back(monkeypatch, tmp_path, locks):
    if not locks:
        monkeypatch.setattr(lease_module, "locked", _no_lock)
    first = Lease(tmp_path, heartbeat_seconds=HEARTBEAT, job_id="5")
    first.acquire()
    second = Lease(tmp_path, heartbeat_seconds=HEARTBEAT, job_id="5", restart_count=1)
    replace, came_too_late = os.replace, []

    def suspended(source: Path, target: Path) -> None:
        if first.token in str(source) and not came_too_late:
            came_too_late.append(True)
            second.acquire()  # meanwhile, elsewhere
        replace(source, target)

    monkeypatch.setattr(os, "replace", suspended)
    wait_for(lambda: first.lost)
    assert came_too_late and record(tmp_path)["token"] == second.token
    with pytest.raises(LeaseLostError):
        first.check()
    second.check()
    second.release()
    assert list(tmp_path.glob(".lease*")) == []


def test_a_requeued_job_takes_over_at_once_and_its_older_self_loses(start, tmp_path):
    old = start(tmp_path, host="node1", job_id="4711", restart_count=0)
    old.ask("acquire")
    began = time.monotonic()
    with taken(tmp_path, host="node2", job_id="4711", restart_count=1, stale_seconds=60) as lease:
        assert time.monotonic() - began < 5
        assert len(lease.said) == 1 and "requeued" in lease.said[0]
        with pytest.raises(LeaseLostError, match=r"host node2, .*SLURM job 4711"):
            old.ask("check")
        # The older self, started late, does not get it back; nor does another job.
        for keys in ({"job_id": "4711", "restart_count": 0}, {"job_id": "4712", "restart_count": 9}):
            with pytest.raises(UserError, match="another run trains"):
                start(tmp_path, host="node1", stale_seconds=60, **keys).ask("acquire")
        lease.check()


@pytest.mark.parametrize("locks", [True, False])
def test_of_two_simultaneous_starts_exactly_one_goes_on(start, tmp_path, locks):
    starts = [start(), start()]
    for process in starts if not locks else []:
        process.ask("without_locks")
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        tokens = [process.ask("new", folder, host=f"node{i}") for i, process in enumerate(starts)]
        for process in starts:
            process.tell("acquire")
        outcomes = [process.answer()[0] for process in starts]
        winners = [i for i in range(2) if outcomes[i] == tokens[i]]
        if locks:
            assert len(winners) == 1
            assert isinstance(outcomes[1 - winners[0]], UserError)
        time.sleep(3 * HEARTBEAT)
        for i in winners[:]:
            try:
                starts[i].ask("check")
            except LeaseLostError:
                winners.remove(i)
        assert len(winners) == 1
        assert record(folder)["token"] == tokens[winners[0]]
        for process in starts:
            process.ask("release")


def silent_holder(folder: Path) -> dict[str, Any]:
    """Leaves the record of a holder on another node that need be watched for a moment only."""
    with taken(folder, host="node1"):
        pass
    left = {**record(folder), "released": False, "heartbeat_seconds": 0.001}
    (folder / "lease.json").write_text(json.dumps(left))
    return left


@pytest.mark.parametrize("moment", ["while it is watched", "before it is overwritten"])
def test_a_holder_that_wakes_late_keeps_the_folder(monkeypatch, tmp_path, moment):
    left = silent_holder(tmp_path)
    owner, name = (time, "sleep") if moment == "while it is watched" else (lease_module, "locked")
    original = getattr(owner, name)

    def one_beat_later(*args: Any) -> Any:
        monkeypatch.setattr(owner, name, original)
        (tmp_path / "lease.json").write_text(json.dumps({**left, "beat": left["beat"] + 1}))
        return original(*args)

    monkeypatch.setattr(owner, name, one_beat_later)
    with pytest.raises(UserError, match="another run trains"):
        Lease(tmp_path, heartbeat_seconds=HEARTBEAT, stale_seconds=HEARTBEAT / 2, host="node2").acquire()
    assert record(tmp_path)["token"] == left["token"]


def test_a_start_that_is_overwritten_where_no_lock_reaches_does_not_go_on(monkeypatch, tmp_path):
    slow, fast = (Lease(tmp_path, heartbeat_seconds=HEARTBEAT, job_id="5", restart_count=i) for i in range(2))
    sleep = time.sleep

    def overtaken(seconds: float) -> None:
        monkeypatch.setattr(time, "sleep", sleep)
        fast.acquire()

    monkeypatch.setattr(time, "sleep", overtaken)
    with pytest.raises(UserError, match="another run trains"):
        slow.acquire()
    fast.check()
    fast.release()


def test_a_released_folder_is_free_and_release_may_be_called_again(start, tmp_path):
    first = start(tmp_path, host="node1")
    first.ask("acquire")
    first.ask("release")
    assert record(tmp_path)["released"] is True
    began = time.monotonic()
    with taken(tmp_path, host="node2", stale_seconds=60) as lease:
        assert time.monotonic() - began < 5 and lease.said == []
        first.ask("release")
        lease.check()
        assert record(tmp_path)["token"] == lease.token and record(tmp_path)["released"] is False


def test_a_lease_never_taken_releases_nothing(start, tmp_path):
    with taken(tmp_path) as lease:
        Lease(tmp_path).release()
        lease.check()


@pytest.mark.parametrize("kept", [0.5, 0.0, None])
def test_a_torn_file_is_taken(tmp_path, kept):
    with taken(tmp_path):
        pass
    path = tmp_path / "lease.json"
    whole = path.read_bytes()
    path.write_bytes(b"\xff[]" if kept is None else whole[: int(len(whole) * kept)])
    with taken(tmp_path) as lease:
        assert record(tmp_path)["token"] == lease.token


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": -1}, {"pid": "1"}, {"restart_count": None}, {"heartbeat_seconds": float("inf")},
        {"heartbeat_seconds": "soon"}, {"beat": []},
    ],
)  # fmt: skip
def test_a_file_that_no_start_wrote_is_taken(tmp_path, changes):
    left = {**silent_holder(tmp_path), **changes}
    (tmp_path / "lease.json").write_text(json.dumps(left))
    with taken(tmp_path, stale_seconds=3600) as lease:
        assert record(tmp_path)["token"] == lease.token


def test_a_heartbeat_is_believed_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "SLOWEST_HEARTBEAT", HEARTBEAT)
    left = {**silent_holder(tmp_path), "heartbeat_seconds": 1e9}
    (tmp_path / "lease.json").write_text(json.dumps(left))
    with taken(tmp_path, stale_seconds=HEARTBEAT) as lease:
        assert "it has been silent for 0.6" in lease.said[-1]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_lease_that_is_no_regular_file_is_refused(tmp_path, make):
    make(tmp_path / "lease.json")
    with pytest.raises(OSError, match="Not a regular file"):
        Lease(tmp_path).acquire()


def test_temporary_files_of_killed_starts_are_removed(tmp_path):
    (tmp_path / ".lease.json.0123456789abcdef.tmp").write_text("{")
    with taken(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lease.json", "lease.lock"]


def test_heartbeats_that_cannot_be_written_do_not_end_the_run_and_go_on_later(start, tmp_path):
    holder = start(tmp_path)
    holder.ask("acquire")
    holder.ask("allow_files_of", 0)
    time.sleep(3 * HEARTBEAT)
    beat = record(tmp_path)["beat"]
    time.sleep(3 * HEARTBEAT)
    assert record(tmp_path)["beat"] == beat
    assert holder.ask("check") is None and holder.ask("lost") is False
    holder.ask("allow_files_of", -1)
    wait_for(lambda: record(tmp_path)["beat"] > beat)
    holder.ask("allow_files_of", 0)
    assert holder.ask("release") is None


def test_release_of_a_folder_that_is_gone_raises_nothing(tmp_path):
    with taken(tmp_path / "run"):
        for path in [*(tmp_path / "run").iterdir()]:
            path.unlink(missing_ok=True)
        (tmp_path / "run").rename(tmp_path / "away")


def test_a_process_that_holds_a_lease_can_end(start, tmp_path):
    holder = start(tmp_path)
    holder.ask("acquire")
    holder._connection.close()
    holder.process.join(10)
    assert holder.process.exitcode == 0
