"""Shards behind a URL: fetched once per node, complete or not at all, resumed after any interruption."""

import contextlib
import logging
import re
import shutil
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from npp_ds.data import remote
from npp_ds.data.manifest import Manifest, ShardInfo
from npp_ds.data.shards import verify
from npp_ds.data.store import available_manifest, load_manifest, stage
from npp_ds.errors import UserError
from runs import WATCHED, assert_same, outcome_of, run, tiny_config
from shard_sets import manifest_of, write_set
from staging import PATIENCE, SPAWN, assert_holds, entries, finish, kill, stage_and_report, start

SHARDS = [f"train-{i:06d}.tar" for i in range(3)]


class Server:
    """Serves `folder` at `url`, counts the GETs of each file, and answers with `faults[name]` until they are used up.

    A fault is called with the request's handler and the file's content instead of sending that.
    """

    def __init__(self, folder):
        self.requests, self.faults, outer = Counter(), {}, self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.removeprefix("/set/")
                outer.requests[name] += 1
                if not (folder / name).is_file():
                    self.send_error(404)
                    return
                fault = outer.faults[name].pop(0) if outer.faults.get(name) else send
                fault(self, (folder / name).read_bytes())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/set"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def send(handler, content, length=None):
    handler.send_response(200)
    handler.send_header("Content-Length", str(length or len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def cut(handler, content):
    send(handler, content[: len(content) // 2], length=len(content))


def shorten(handler, content):
    send(handler, content[:-512])


def lengthen(handler, content):
    send(handler, content + bytes(512))


def flip(handler, content):
    send(handler, content[:700] + bytes([content[700] ^ 1]) + content[701:])


def stall(handler, content):
    """Half of the content, then silence until the other side has gone."""
    send(handler, content[: len(content) // 2], length=len(content))
    handler.connection.settimeout(PATIENCE)
    handler.connection.recv(1)


@pytest.fixture
def published(tmp_path, monkeypatch, caplog):
    """(server, codes, labels) of a set of 90 images in three shards; `caplog` has what is logged."""
    caplog.set_level(logging.INFO, "npp_ds")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(remote, "STALL_SECONDS", 1)
    codes, labels = write_set(tmp_path / "shards", 90, num_shards=3)
    server = Server(tmp_path / "shards")
    yield server, codes, labels
    server.close()


def name_of(tmp_path):
    return Manifest.load(tmp_path / "shards").fingerprint()


def test_set_behind_a_url_is_staged_like_one_in_a_folder(tmp_path, published, caplog):
    server, codes, labels = published
    store = stage(f"{server.url}/", tmp_path / "cache")
    assert_holds(store, codes, labels)
    assert store.manifest == Manifest.load(tmp_path / "shards") == load_manifest(server.url)
    assert entries(tmp_path / "cache") == [name_of(tmp_path)]
    assert [server.requests[name] for name in SHARDS] == [1, 1, 1]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{server.url}: fetching 3 of 3 shards (")
    assert record.any_rank, "whichever process fetches"
    assert_holds(stage(server.url, tmp_path / "cache"), codes, labels)
    assert len(caplog.records) == 1
    assert [server.requests[name] for name in SHARDS] == [1, 1, 1]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (cut, r"curl ended with exit code 18 \(see its message\)"),
        (shorten, r"found \d+ bytes, expected \d+"),
        (lengthen, r"found more than the \d+ bytes expected"),
        (flip, "found SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
    ],
)
def test_shard_that_arrives_wrong_is_fetched_again_and_then_refused(tmp_path, published, caplog, fault, reason):
    server, codes, labels = published
    server.faults[SHARDS[1]] = [fault] * 4
    with pytest.raises(UserError, match=rf"{server.url}/{SHARDS[1]}: .*{reason}, in each of 4 tries; .*run again"):
        stage(server.url, tmp_path / "cache")
    assert [server.requests[name] for name in SHARDS] == [1, 4, 0]
    (left,) = (tmp_path / "cache").glob("*.download")
    assert sorted(path.name for path in left.iterdir()) == ["manifest.json", "source.txt", SHARDS[0]]

    server.faults[SHARDS[1]] = [fault]
    caplog.clear()
    assert_holds(stage(server.url, tmp_path / "cache"), codes, labels)
    assert [server.requests[name] for name in SHARDS] == [1, 6, 1]
    assert caplog.messages[0].startswith(f"{server.url}: fetching 2 of 3 shards")
    assert re.search(rf"{SHARDS[1]}: .*{reason}; trying again", caplog.messages[1])
    assert entries(tmp_path / "cache") == [name_of(tmp_path)]


def test_server_that_falls_silent_is_given_up_and_asked_again(tmp_path, published, caplog):
    server, codes, labels = published
    server.faults[SHARDS[1]] = [stall]
    assert_holds(stage(server.url, tmp_path / "cache"), codes, labels)
    assert f"{SHARDS[1]}: too slow: below 16,000 bytes a second after 1 s" in caplog.messages[1]
    assert [server.requests[name] for name in SHARDS] == [1, 2, 1]


def drip(handler, content):
    """Two bytes at a time, slowly, until the other side has gone."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"[[")
            time.sleep(0.05)


def flood(handler, content):
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b" " * (1 << 20))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (stall, "too slow: not done"),
        (drip, "too slow: not done"),
        (flood, "more than the 10,000,000 bytes"),
    ],
)
def test_manifest_that_does_not_end_is_given_up(tmp_path, published, monkeypatch, fault, reason):
    server, _, _ = published
    monkeypatch.setattr(remote, "MANIFEST_SECONDS", 2)
    monkeypatch.setattr(remote, "SMALL_FILE_BYTES", 10_000_000)
    server.faults["manifest.json"] = [fault] * 4
    started = time.monotonic()
    with pytest.raises(UserError, match=f"^{server.url}/manifest.json: {reason}"):
        stage(server.url, tmp_path / "cache")
    assert time.monotonic() - started < 20
    assert server.requests["manifest.json"] == 1


def test_shard_that_arrives_too_slowly_is_given_up(tmp_path, published):
    server, _, _ = published
    server.faults[SHARDS[1]] = [drip] * 4
    with pytest.raises(UserError, match=f"{SHARDS[1]}: too slow: below 16,000 bytes a second .*in each of 4 tries"):
        stage(server.url, tmp_path / "cache")


def test_download_resumes_from_another_server_when_the_first_one_died(tmp_path, published):
    server, codes, labels = published
    dying = Server(tmp_path / "shards")

    def die(handler, content):
        cut(handler, content)
        dying.server.socket.close()

    dying.faults[SHARDS[2]] = [die]
    try:
        with pytest.raises(UserError, match=rf"{dying.url}/{SHARDS[2]}: .*exit code"):
            stage(dying.url, tmp_path / "cache")
    finally:
        dying.close()
    assert_holds(stage(server.url, tmp_path / "cache"), codes, labels)
    assert [server.requests[name] for name in SHARDS] == [0, 0, 1]


@pytest.mark.processes
def test_run_on_shards_behind_a_url_is_the_run_on_the_folder(pair, shards, undisturbed, tmp_path):
    servers = {key: Server(shards / key) for key in ("train", "val")}
    try:
        data = {"cache_dir": str(tmp_path / "cache"), **{key: server.url for key, server in servers.items()}}
        pair.run(run, tiny_config(shards, tmp_path / "run", data=data, **WATCHED))
    finally:
        for server in servers.values():
            server.close()
    assert_same(outcome_of(tmp_path / "run"), undisturbed)
    assert [servers["train"].requests[name] for name in SHARDS] == [1, 1, 0]
    assert servers["val"].requests[SHARDS[0]] == 1


@pytest.mark.processes
def test_killed_download_resumes_without_fetching_finished_shards_again(tmp_path, published):
    server, codes, labels = published
    halfway, released = threading.Event(), threading.Event()

    def hang(handler, content):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:-1000])
        handler.wfile.flush()
        halfway.set()
        assert released.wait(timeout=PATIENCE)

    server.faults[SHARDS[1]] = [hang]
    process = start(stage, server.url, tmp_path / "cache")
    try:
        assert halfway.wait(timeout=PATIENCE)
        kill(process)
    finally:
        released.set()
    assert entries(tmp_path / "cache") == [f"{name_of(tmp_path)}.download"]
    assert_holds(stage(server.url, tmp_path / "cache"), codes, labels)
    assert [server.requests[name] for name in SHARDS] == [1, 2, 1]
    assert entries(tmp_path / "cache") == [name_of(tmp_path)]


@pytest.mark.processes
def test_processes_that_stage_at_once_fetch_each_shard_once(tmp_path, published):
    server, codes, labels = published
    barrier, results = SPAWN.Barrier(2), SPAWN.Queue()
    processes = [start(stage_and_report, server.url, tmp_path / "cache", barrier, results) for _ in range(2)]
    reports = [results.get(timeout=PATIENCE) for _ in processes]
    assert finish(*processes) == [0, 0]
    assert [report[:2] for report in reports] == [(int(codes.sum()), labels.tolist())] * 2
    assert sorted(report[2] for report in reports) == [[], [30, 60, 90]]
    assert [server.requests[name] for name in SHARDS] == [1, 1, 1]


def test_what_an_interrupted_download_left_is_checked_before_it_is_used(tmp_path, published):
    server, codes, labels = published
    server.faults[SHARDS[2]] = [flip] * 4
    with pytest.raises(UserError, match="SHA-256"):
        stage(server.url, tmp_path / "cache")
    (left,) = (tmp_path / "cache").glob("*.download")
    content = (left / SHARDS[0]).read_bytes()
    (left / SHARDS[0]).write_bytes(content[:-1] + b"x")
    assert_holds(stage(server.url, tmp_path / "cache"), codes, labels)
    assert [server.requests[name] for name in SHARDS] == [2, 1, 5]


def test_set_that_changed_behind_its_url_is_fetched_anew_and_that_is_logged(tmp_path, published, caplog):
    server, _, _ = published
    stage(server.url, tmp_path / "cache")
    first = name_of(tmp_path)
    write_set(tmp_path / "shards", 90, num_shards=3, seed=1)
    server.faults[SHARDS[2]] = [flip] * 4
    with pytest.raises(UserError, match="SHA-256"):
        stage(server.url, tmp_path / "cache")
    abandoned = name_of(tmp_path)
    assert entries(tmp_path / "cache") == sorted([first, f"{abandoned}.download"])
    codes, labels = write_set(tmp_path / "shards", 80, num_shards=3, seed=2)
    caplog.clear()
    assert_holds(stage(server.url, tmp_path / "cache"), codes, labels)
    assert caplog.messages[0].startswith(f"{server.url}: the shards have changed since they were staged in")
    assert entries(tmp_path / "cache") == sorted([first, name_of(tmp_path)])


def test_bad_content_that_the_manifest_agrees_with_is_named_with_url_file_and_key(tmp_path, published):
    server, _, _ = published
    manifest = Manifest.load(tmp_path / "shards")
    manifest.model_copy(update={"vocab_size": 900}).save(tmp_path / "shards")
    expected = rf"{server.url}: .*{SHARDS[0]}, key '.*': code 9\d\d out of range, expected below 900 .*shards verify"
    with pytest.raises(UserError, match=expected) as error:
        stage(server.url, tmp_path / "cache")
    (left,) = (tmp_path / "cache").glob("*.download")
    assert f"`npp shards verify {left}`" in str(error.value)
    assert len(verify(left)) > 1
    manifest.save(tmp_path / "shards")
    assert len(stage(server.url, tmp_path / "cache")) == 90
    assert entries(tmp_path / "cache") == [manifest.fingerprint()]


def test_command_is_run_for_each_file(tmp_path):
    codes, labels = write_set(tmp_path / "shards", 20, num_shards=2)
    log = tmp_path / "log"
    source = f"pipe:echo {{file}} >> {log} && cat '{tmp_path}/shards/{{file}}'"
    remote.allow_commands([f"data.train={source}"])
    assert_holds(stage(source, tmp_path / "cache"), codes, labels)
    assert log.read_text().split() == ["manifest.json", *SHARDS[:2]]


def test_command_that_fails_is_named_with_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.0)
    write_set(tmp_path / "shards", 20)
    failing = f"pipe:test {{file}} = manifest.json || exit 3; cat {tmp_path}/shards/{{file}}"
    remote.allow_commands([failing, "pipe:cat /data"])
    with pytest.raises(UserError, match=rf"^pipe:.*{SHARDS[0]}.*: the command ended with exit code 3 .*in each of 4"):
        stage(failing, tmp_path / "cache")
    with pytest.raises(UserError, match=r"^pipe:cat /data: found no \{file\} in the command; .*pipe:ssh"):
        stage("pipe:cat /data", tmp_path / "cache")


@pytest.mark.parametrize("url", ["gs://x/'; touch log; '", "scp://x/a b", "https://x/\\{file}", "hf://x/\n"])
def test_url_that_a_shell_would_read_as_more_than_a_word_is_refused(url, tmp_path):
    with pytest.raises(UserError, match="expected it as %27"):
        stage(url, tmp_path / "cache")


def test_what_fsspec_opens_is_staged(tmp_path):
    import fsspec

    codes, labels = write_set(tmp_path / "shards", 20, num_shards=2)
    fsspec.filesystem("memory").put(str(tmp_path / "shards"), "/bucket/train", recursive=True)
    assert_holds(stage("memory://bucket/train", tmp_path / "cache"), codes, labels)


def test_set_that_cannot_be_had_is_refused_by_its_url(tmp_path, published):
    server, _, _ = published
    (tmp_path / "shards" / SHARDS[1]).unlink()
    with pytest.raises(UserError, match=rf"^{server.url}/{SHARDS[1]}: curl ended with exit code 22"):
        stage(server.url, tmp_path / "cache")
    (tmp_path / "shards" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=rf"^{server.url}/manifest.json: not valid JSON"):
        stage(server.url, tmp_path / "cache")
    with pytest.raises(UserError, match=r"^nosuch://host/set/manifest.json: ValueError: Protocol not known: nosuch"):
        stage("nosuch://host/set", tmp_path / "cache")
    manifest_of([]).save(tmp_path / "shards")
    with pytest.raises(UserError, match=rf"^{server.url}: holds no samples"):
        stage(server.url, tmp_path / "cache")


@pytest.mark.parametrize("file", ["a;touch stolen;.tar", "$(touch stolen).tar", "-rf.tar", "a b.tar", "x?y.tar"])
def test_manifest_cannot_put_words_into_the_command(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    manifest_of([ShardInfo(file=file, samples=1, bytes=1, sha256="0" * 64)]).save(tmp_path)
    remote.allow_commands([f"pipe:cat {tmp_path}/{{file}}"])
    with pytest.raises(UserError, match=r"expected only letters, digits, .* in the name"):
        stage(f"pipe:cat {tmp_path}/{{file}}", tmp_path / "cache")
    assert not (tmp_path / "stolen").exists()


def test_room_is_needed_for_shards_and_arrays_less_what_has_been_fetched(tmp_path, published, monkeypatch):
    server, codes, labels = published
    shards = sum(shard.bytes for shard in Manifest.load(tmp_path / "shards").shards)
    arrays = codes.nbytes + labels.nbytes
    server.faults[SHARDS[2]] = [flip] * 4
    with pytest.raises(UserError, match="SHA-256"):
        stage(server.url, tmp_path / "cache")
    (left,) = (tmp_path / "cache").glob("*.download")
    fetched = sum(path.stat().st_size for path in left.iterdir())
    free = shards + arrays - fetched
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(UserError, match=f"{shards + arrays - 1:,} bytes free, {shards + arrays:,} needed"):
        stage(server.url, tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert_holds(stage(server.url, tmp_path / "cache"), codes, labels)


def test_manifest_of_a_staged_url_is_available_without_the_network(tmp_path):
    write_set(tmp_path / "shards", 20)
    source = f"pipe:cat {tmp_path}/shards/{{file}}"
    assert available_manifest(source, tmp_path / "cache") is None
    remote.allow_commands([source])
    manifest = stage(source, tmp_path / "cache").manifest
    shutil.rmtree(tmp_path / "shards")
    assert available_manifest(source, tmp_path / "cache") == manifest
