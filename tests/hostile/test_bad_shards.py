"""Sets of shards that a stranger could send: each is refused in one line, soon and in little memory."""

import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import assert_refused, run_limited

from npp_ds.data.manifest import ShardInfo
from npp_ds.utils.files import sha256
from runs import tiny_config
from shard_sets import manifest_of, write_set

pytestmark = pytest.mark.processes
SHARD = "train-000000.tar"
END = bytes(10240)
CODES = np.arange(48, dtype=np.uint16).reshape(3, 16)


def header(name: str, size: int | bytes = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header whose check sum is right; `size` is the number or the bytes of its field."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def base_256(number: int) -> bytes:
    """A size field in GNU's binary form."""
    return (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(11, "big", signed=True)


def pax(records: dict[str, str]) -> bytes:
    """A PAX header for the next member."""
    content = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        content += str(len(body) + len(str(len(body) + 4))).encode() + body
    return member("pax", content, tarfile.XHDTYPE)


def npy(shape: object = (3, 16), data: bytes = CODES.tobytes(), extra: str = "") -> bytes:
    """A .npy file with any shape in its header."""
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, {extra}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def sample(codes: bytes = npy(), label: bytes = b"1", key: str = "a") -> bytes:
    return member(f"{key}.codes.npy", codes) + member(f"{key}.cls", label)


def test_the_builders_make_a_set_that_is_accepted(tmp_path):
    """Otherwise the cases below would be refused for another reason."""
    set_of(tmp_path, sample() + pax({"comment": "x"}) + sample(key="b") + END, samples=2)
    with pytest.raises(AssertionError, match="accepted"):
        assert_refused("shards", "verify", tmp_path)


def set_of(folder: Path, content: bytes, samples: int = 1) -> None:
    """Write one shard and the manifest that describes it."""
    (folder / SHARD).write_bytes(content)
    info = ShardInfo(file=SHARD, samples=samples, bytes=len(content), sha256=sha256(folder / SHARD))
    manifest_of([info]).save(folder)


LONG_NAME = member("long", b"b.codes.npy\0", tarfile.GNUTYPE_LONGNAME)
BAD_KEY = "expected 1 to 80 printable ASCII characters"
SHARDS = {
    "negative size": (header("b.cls", base_256(-1536)), "damaged after member 'a.cls'"),
    "negative octal size": (header("b.cls", b"-0000001000\0"), "damaged after member 'a.cls'"),
    "size of 2^70": (header("b.codes.npy", base_256(1 << 70)), "1,180,591,620,717,411,303,424 bytes, expected at most"),
    "negative PAX size": (pax({"size": "-1536"}) + header("b.cls"), "damaged after member 'a.cls'"),
    "PAX sparse of many parts": (
        pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + member("b.cls", b"9" * 400 + b"\n0\n" * 200),
        "damaged after member 'a.cls'",
    ),
    "PAX sparse": (pax({"GNU.sparse.map": "0,1"}) + member("b.cls", b"1"), "member 'b.cls': not a plain file"),
    "GNU sparse": (header("b.cls", 0, tarfile.GNUTYPE_SPARSE), "member 'b.cls': not a plain file"),
    "link": (header("b.cls", 0, tarfile.SYMTYPE), "member 'b.cls': not a plain file"),
    "chained long names": (LONG_NAME * 3000 + sample(key="b"), "damaged after member 'a.cls'"),
    "long name of 8 GiB": (header("b", base_256(1 << 33), tarfile.GNUTYPE_LONGNAME), "header is too long"),
    "NUL in a key": (pax({"path": "b\0c.cls"}) + member("b", b"1"), BAD_KEY),
    "key of 5,000 letters": (pax({"path": "b" * 5000 + ".cls"}) + member("b", b"1"), BAD_KEY),
    "escape in a key": (sample(key="b\x1b[2J"), BAD_KEY),
    "key that begins with /": (sample(key="/b"), BAD_KEY),
    "label of 4 GiB": (header("b.cls", base_256(1 << 32)), "4,294,967,296 bytes, expected at most 32"),
    "label of thirty nines": (sample(label=b"9" * 30, key="b"), "bad cls: found b'9999"),
    "label out of range": (sample(label=b"10", key="b"), "label 10 out of range, expected below 10"),
    "shape with True": (sample(npy("(True, 48)"), key="b"), "bad codes.npy: the shape is (True, 48)"),
    "negative shape": (sample(npy((-3, -16)), key="b"), "bad codes.npy: the shape is (-3, -16)"),
    "unknown length": (sample(npy((-1, 16)), key="b"), "bad codes.npy: the shape is (-1, 16)"),
    "huge shape": (sample(npy((10**30, 16)), key="b"), "bad codes.npy: 96 bytes for the shape"),
    "no codes": (sample(npy((0, 16), b""), key="b"), "codes are [0, 16], expected [3, 16]"),
    "deep npy header": (sample(npy("(" * 4000), key="b"), "bad codes.npy: bad header"),
    "odd keys in the npy header": (sample(npy(extra="1: 2"), key="b"), "bad codes.npy: bad header"),
    "unhashable key in the npy header": (sample(npy(extra="[]: 2"), key="b"), "bad codes.npy: bad header"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARDS)
def test_bad_shard_is_refused_with_file_and_member(tmp_path, case):
    content, phrase = SHARDS[case]
    set_of(tmp_path, sample() + content + END, samples=2)
    message = assert_refused("shards", "verify", tmp_path, phrase=phrase)
    assert SHARD in message
    assert len(message) < 1000


def change(**fields):
    """Change fields of a manifest's JSON."""

    def build(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return build


def rename(file: str):
    """Give the shard another name in the manifest."""
    return change(shards=[{"file": file, "samples": 5, "bytes": 20480, "sha256": "0" * 64}])


def put(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def replaced(name: str, make):
    """Put what `make(path)` makes in place of a file."""

    def build(folder: Path) -> None:
        path = folder / name
        path.unlink()
        make(path)

    return build


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


PLAIN = "expected a plain file name"
SETS = {
    "deep JSON": (put("manifest.json", b"[" * 100_000), "not valid JSON (nested too deeply)"),
    "passed over without counts": (change(source={"passed_over": {"x": [1]}}), "passed_over is {'x': [1]}, expected a"),
    "nested source": (change(source={"kind": [[[]]]}), "kind is [[[]]], expected"),
    "no UTF-8": (put("manifest.json", b'{"a": "\xff"}'), "not valid JSON"),
    "1e400": (put("manifest.json", b'{"a": 1e400}'), "not valid JSON (number 1e400 out of range)"),
    "5,000 digits": (put("manifest.json", b"9" * 5000), "not valid JSON"),
    "manifest is a FIFO": (replaced("manifest.json", os.mkfifo), "manifest.json: Not a regular file"),
    "manifest is a device": (replaced("manifest.json", zeros), "manifest.json: Not a regular file"),
    "manifest is a folder": (replaced("manifest.json", os.mkdir), "manifest.json: Is a directory"),
    "manifest is a loop": (replaced("manifest.json", loop), "manifest.json: Too many levels of symbolic links"),
    "manifest of 1 TiB": (replaced("manifest.json", sparse), "manifest.json: Larger than the 67,108,864 bytes"),
    "shard is a FIFO": (replaced(SHARD, os.mkfifo), f"{SHARD}: found 0 bytes, expected 20480"),
    "shard is a device": (replaced(SHARD, zeros), f"{SHARD}: found 0 bytes, expected 20480"),
    "shard is a folder": (replaced(SHARD, os.mkdir), f"{SHARD}: found"),
    "shard is a loop": (replaced(SHARD, loop), f"{SHARD}: Too many levels of symbolic links"),
    "shard of another folder": (rename("../x.tar"), PLAIN),
    "absolute shard": (rename("/etc/x.tar"), PLAIN),
    "NUL in a shard's name": (rename("a\0.tar"), PLAIN),
    "escape in a shard's name": (rename("\x1b[2J.tar"), PLAIN),
    "line break in a shard's name": (rename("a\nerror: b.tar"), PLAIN),
    "shard's name of 5,000 letters": (rename("a" * 5000 + ".tar"), PLAIN),
    "10^18 classes": (change(num_classes=10**18), "num_classes: Input should be less than or equal to 1000000"),
    "grid of 10^9": (change(grid_size=10**9), "grid_size: Input should be less than or equal to 4096"),
    "bytes that are no number": (change(source={"bytes": "many"}), "bytes is 'many', expected an integer"),
    "10,000 problems": (change(shards=[{}] * 10_000), "and 39995 more problems"),
    "escape in an unknown key": (change(**{"\x1b[2J\n" * 1000: 1}), "Extra inputs are not permitted"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETS)
def test_bad_set_is_refused_with_the_file(tmp_path, case):
    build, phrase = SETS[case]
    write_set(tmp_path, 5)
    build(tmp_path)
    assert len(assert_refused("shards", "show", tmp_path, phrase=phrase)) < 2000


def test_command_in_a_config_file_is_run_only_if_the_command_line_repeats_it(tmp_path, shards):
    command = f"pipe:echo {{file}} >> {tmp_path}/log; cat {shards}/train/{{file}}"
    config = tiny_config(shards, tmp_path / "run", data={"train": command, "cache_dir": str(tmp_path / "cache")})
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for action in ("doctor", "train"):
        for words in ((), (f"data.val={command} | tee",)):
            assert_refused(action, "--config", file, *words, phrase="{file}: found in a file, expected on the command")
        assert not (tmp_path / "log").exists()
    done = run_limited("doctor", "--config", file, f"data.train={command}", seconds=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "manifest.json" in (tmp_path / "log").read_text()


def test_a_class_beyond_ascii_is_printed_escaped_by_a_fresh_process(tmp_path):
    write_set(tmp_path, 5)
    change(class_names=[*"abcdefghi", "ü"])(tmp_path)
    line = [sys.executable, "-m", "npp_ds", "shards", "show", tmp_path]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert "\\xfc     9  " in done.stdout and "which is not available" in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_picture_that_cannot_be_written_is_reported_before_the_set_is_read(tmp_path):
    write_set(tmp_path, 5)
    (tmp_path / SHARD).unlink()
    assert_refused(
        "shards", "show", tmp_path, "--out", "/proc/sheet.png", phrase="free some space, or name another path"
    )
