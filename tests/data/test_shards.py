"""The shard format: stock WebDataset reads it, writing is atomic and deterministic, faults are found and named."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile

import numpy as np
import pytest

from npp_ds.data.manifest import CropInfo, Manifest, ShardInfo
from npp_ds.data.shards import ShardWriter, read_shard, verify
from npp_ds.errors import UserError
from npp_ds.utils.files import sha256
from shard_sets import CROP_NAMES, files_limited_to, manifest_of, random_set, write_set

CODES, LABELS = random_set(6)
KEYS = [f"n{i:02d}.folder/image {i}" for i in range(6)]


def write_shard(path, keys=KEYS, codes=CODES, labels=LABELS) -> ShardInfo:
    with ShardWriter(path) as writer:
        for key, sample, label in zip(keys, codes, labels, strict=True):
            writer.write(key, sample, int(label))
    return writer.info


def repack(path, change):
    """Rewrites a shard with `change(members)` applied to its [(name, content)] list."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def relist(directory, **changes):
    """Makes the manifest agree with the bytes of the shards again, so that only their content is at fault."""
    manifest = Manifest.load(directory)
    shards = [
        shard.model_copy(update={"bytes": path.stat().st_size, "sha256": sha256(path)})
        for shard in manifest.shards
        for path in [directory / shard.file]
    ]
    manifest.model_copy(update={"shards": shards, **changes}).save(directory)


def test_stock_webdataset_reads_the_same_codes_and_labels(tmp_path):
    import webdataset as wds

    codes, labels = write_set(tmp_path, 23, num_shards=2)
    paths = sorted(tmp_path.glob("*.tar"))
    stock = [
        (sample["__key__"], sample["codes.npy"], sample["cls"])
        for sample in wds.WebDataset([str(path) for path in paths], shardshuffle=False).decode()
    ]
    ours = [sample for path in paths for sample in read_shard(path)]
    assert len(stock) == len(ours) == 23
    for row, ((stock_key, stock_codes, stock_label), (key, read, label)) in enumerate(zip(stock, ours, strict=True)):
        assert stock_key == key == f"n{labels[row]:08d}/image_{row:05d}"
        assert stock_label == label == labels[row]
        assert stock_codes.dtype == read.dtype == np.uint16
        np.testing.assert_array_equal(stock_codes, codes[row])
        np.testing.assert_array_equal(read, codes[row])


def test_shards_written_by_stock_webdataset_are_read(tmp_path):
    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "stock.tar")) as writer:
        for key, codes, label in zip(KEYS, CODES, LABELS, strict=True):
            writer.write({"__key__": key, "codes.npy": codes, "cls": int(label)})
    for row, (key, codes, label) in enumerate(read_shard(tmp_path / "stock.tar")):
        assert (key, label) == (KEYS[row], LABELS[row])
        np.testing.assert_array_equal(codes, CODES[row])
    assert row == 5


def test_bytes_of_a_shard_depend_on_its_samples_only(tmp_path, monkeypatch):
    codes = (np.arange(96, dtype=np.uint16) * 37 % 1000).reshape(2, 3, 16)
    first = write_shard(tmp_path / "train-000000.tar", ["a/1", "b/2"], codes, [3, 11])
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setenv("USER", "somebody")
    before = os.umask(0o077)
    try:
        again = write_shard(tmp_path / "train-000001.tar", ["a/1", "b/2"], codes, [3, 11])
    finally:
        os.umask(before)
    assert first.sha256 == again.sha256 == "ef608e7ad8adbc7d9ab543bd7c4159e5a82a2a0b61b2b2ee2208b9b593fad20c"
    for info in (first, again):
        path = tmp_path / info.file
        assert (info.samples, info.bytes, info.sha256) == (2, path.stat().st_size, sha256(path))


def test_shard_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "train-000000.tar"
    with ShardWriter(path) as writer:
        for key, codes in zip(KEYS, CODES, strict=True):
            writer.write(key, codes, 0)
            assert list(tmp_path.glob("*.tar")) == []
    assert os.listdir(tmp_path) == ["train-000000.tar"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path, failure):
    path = tmp_path / "train-000000.tar"

    def fail():
        with ShardWriter(path) as writer:
            writer.write("a", CODES[0], 1)
            raise failure

    with pytest.raises(failure):
        fail()
    assert os.listdir(tmp_path) == []
    info = write_shard(path)
    with pytest.raises(failure):
        fail()
    assert os.listdir(tmp_path) == [path.name]
    assert sha256(path) == info.sha256


@pytest.mark.parametrize("size", [0, 512, 10_000, 10_240, 20_000])
def test_full_disk_leaves_no_half_shard(tmp_path, size):
    path = tmp_path / "train-000000.tar"
    rng = np.random.default_rng(0)
    with pytest.raises(OSError), files_limited_to(size), ShardWriter(path) as writer:
        for i in range(8):
            writer.write(f"key_{i}", rng.integers(0, 1000, (10, 64), dtype=np.uint16), i)
    assert os.listdir(tmp_path) == []
    assert write_shard(path).samples == 6


def write_and_hang(path, started):
    with ShardWriter(path) as writer:
        for key, codes in zip(KEYS, CODES, strict=True):
            writer.write(key, codes, 0)
        started.set()
        signal.pause()


def test_killed_writer_leaves_no_shard_and_is_no_obstacle(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    path = tmp_path / "train-000000.tar"
    process = context.Process(target=write_and_hang, args=(path, started), daemon=True)
    process.start()
    assert started.wait(timeout=60)
    process.kill()
    process.join(timeout=10)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob("*.tar")) == []
    assert write_shard(path).samples == len(list(read_shard(path))) == 6


@pytest.mark.parametrize(
    ("key", "codes", "label", "message"),
    [
        ("first", CODES[0], 0, "written twice"),
        ("a", CODES[0].astype(np.int64), 0, r"codes are int64 \[3, 16\], expected uint16 \[3, 16\]"),
        ("a", CODES[0][:2], 0, r"codes are uint16 \[2, 16\], expected uint16 \[3, 16\]"),
        ("a", CODES[0][0], 0, r"codes are uint16 \[16\]"),
        ("a", CODES[0], -1, "label -1"),
        ("a", CODES[0], 1.5, "label 1.5"),
        *((key, CODES[0], 0, "printable ASCII") for key in ("a.b", "", "x/", "/a", "__a__", "é", "a\n", "a" * 81)),
    ],
)
def test_sample_that_could_not_be_read_back_is_refused_by_key(tmp_path, key, codes, label, message):
    path = tmp_path / "train-000000.tar"
    with pytest.raises(UserError, match=message) as error, ShardWriter(path) as writer:
        writer.write("first", CODES[0], 0)
        writer.write(key, codes, label)
    assert str(path) in str(error.value)
    assert repr(key) in str(error.value)
    assert os.listdir(tmp_path) == []


def test_truncation_at_any_block_is_found(tmp_path):
    path = tmp_path / "train-000000.tar"
    write_shard(path)
    content = path.read_bytes()
    used = len(content.rstrip(b"\0"))
    for size in range(0, used + 512, 256):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="train-000000"):
            list(read_shard(path))


def test_damaged_member_header_is_not_taken_for_the_end(tmp_path):
    path = tmp_path / "train-000000.tar"
    write_shard(path)
    content = bytearray(path.read_bytes())
    third = content.index(KEYS[2].encode())
    content[third + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"damaged after member '{KEYS[1]}"):
        list(read_shard(path))


def replace(index, name=None, content=None):
    def change(members):
        members[index] = (name or members[index][0], members[index][1] if content is None else content)

    return change


def npy(array, version=(1, 0)):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members.pop(2), r"key 'n01.folder/image 1': only codes.npy found"),
        (lambda members: members.pop(-1), r"key 'n05.folder/image 5': only cls found"),
        (lambda members: members.insert(2, members[0]), "only cls found"),
        (replace(0, name="n00.folder/image 0.json"), "member 'n00.folder/image 0.json'"),
        (replace(2, content=b"cat"), r"key 'n01.folder/image 1': bad cls: found b'cat'"),
        (replace(2, content=b"-1"), r"key 'n01.folder/image 1': bad cls"),
        (replace(3, content=b"junk"), r"key 'n01.folder/image 1': bad codes.npy"),
        (replace(3, content=npy(CODES[0].astype(np.int64))), "array of int64"),
        (replace(3, content=npy(CODES[0][0])), r"uint16 \[16\], expected"),
        (replace(3, content=npy(np.asfortranarray(CODES[0]))), "expected uint16"),
        (replace(3, content=npy(CODES[0])[:-2]), r"key 'n01.folder/image 1': bad codes.npy"),
        (replace(3, content=npy(CODES[0]) + b"\0\0"), r"key 'n01.folder/image 1': bad codes.npy"),
    ],
)
def test_reading_is_strict_and_names_file_and_key(tmp_path, change, message):
    path = tmp_path / "train-000000.tar"
    write_shard(path)
    repack(path, change)
    with pytest.raises(UserError, match=message) as error:
        list(read_shard(path))
    assert str(path) in str(error.value)


def test_verify_finds_nothing_wrong_with_a_sound_set(tmp_path, monkeypatch, capsys):
    write_set(tmp_path, 20, num_shards=3)
    monkeypatch.setattr("npp_ds.utils.screen.SECONDS_BETWEEN_LINES", 0.0)
    assert verify(tmp_path, show_progress=True) == []
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"verifying: {done}/20 images" for done in range(21)]


def test_verify_names_the_file_of_any_flipped_byte(tmp_path):
    write_set(tmp_path, 4, num_shards=2)
    path = tmp_path / "train-000001.tar"
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        problems = verify(tmp_path)
        assert problems
        assert all("train-000001.tar" in problem for problem in problems)


def only_problem(directory):
    problems = verify(directory)
    assert len(problems) == 1
    return problems[0]


def test_verify_names_codes_labels_and_keys_at_fault(tmp_path):
    codes, labels = write_set(tmp_path, 6, num_shards=2)
    largest = int(codes.max())
    row = int(np.argmax(codes.max(axis=(1, 2))))
    relist(tmp_path, vocab_size=largest)
    assert f"image_{row:05d}': code {largest} out of range, expected below {largest}" in only_problem(tmp_path)

    relist(tmp_path, vocab_size=1000, num_classes=int(labels.max()))
    rows = np.flatnonzero(labels == labels.max())
    problems = verify(tmp_path)
    assert len(problems) == len(rows)
    assert f"image_{rows[0]:05d}': label {labels.max()} out of range" in problems[0]

    relist(tmp_path, num_classes=10, grid_size=2)
    assert len(verify(tmp_path)) == 6
    assert "codes are [3, 16], expected [3, 4]" in verify(tmp_path)[0]


def test_verify_names_duplicate_keys_within_and_across_shards(tmp_path):
    _, labels = write_set(tmp_path, 6, num_shards=2)
    key = f"n{labels[0]:08d}/image_00000"
    repack(tmp_path / "train-000001.tar", lambda members: members.__setitem__(slice(2), duplicate(members[:2], key)))
    relist(tmp_path)
    problem = only_problem(tmp_path)
    assert f"train-000001.tar, key '{key}': duplicate key, already in train-000000.tar" in problem


def duplicate(pair, key):
    return [(key + name[name.index(".", name.index("/")) :], content) for name, content in pair]


def test_verify_names_a_wrong_count(tmp_path):
    write_set(tmp_path, 6, num_shards=2)
    shards = Manifest.load(tmp_path).shards
    wrong = [shards[0].model_copy(update={"samples": 4}), shards[1]]
    manifest_of(wrong).save(tmp_path)
    assert "train-000000.tar: found 3 samples, expected 4" in only_problem(tmp_path)


def test_verify_names_missing_and_extra_shards(tmp_path):
    write_set(tmp_path, 9, num_shards=3)
    (tmp_path / "train-000001.tar").unlink()
    assert "train-000001.tar: No such file" in only_problem(tmp_path)
    shutil.copy(tmp_path / "train-000000.tar", tmp_path / "train-000007.tar")
    problems = verify(tmp_path)
    assert len(problems) == 2
    assert "train-000007.tar: not in manifest.json" in problems[0]


def test_manifest_comes_back_as_it_was_saved(tmp_path):
    write_set(tmp_path, 5)
    manifest = Manifest.load(tmp_path)
    assert (manifest.num_samples, manifest.num_crops, manifest.num_tokens) == (5, 3, 16)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == 1


def test_failed_save_keeps_the_old_manifest(tmp_path):
    write_set(tmp_path, 5)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(OSError), files_limited_to(100):
        manifest_of([]).save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "train-000000.tar"]


def test_fingerprint_changes_with_the_content_and_not_with_the_writer(tmp_path):
    write_set(tmp_path, 5)
    manifest = Manifest.load(tmp_path)
    variants = [
        manifest,
        manifest.model_copy(update={"vocab_size": 999}),
        manifest.model_copy(update={"split": "val"}),
        manifest.model_copy(update={"shards": [manifest.shards[0].model_copy(update={"sha256": "1" * 64})]}),
        manifest.model_copy(update={"class_names": list("abcdefghij")}),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)
    assert manifest.model_copy(update={"created_by": "another"}).fingerprint() == manifest.fingerprint()
    assert len(manifest.fingerprint()) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, expected 'npp-codes' version 1"),
        ({"format": "other"}, "found format 'other'"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"vocab_size": "many"}, "vocab_size: Input should be a valid integer"),
        ({"vocab_size": 65537}, "vocab_size: Input should be less than or equal to 65536"),
        ({"num_samples": 6}, "num_samples is 6, its shards hold 5"),
        ({"class_names": ["one"]}, "1 class_names for num_classes 10"),
        ({"shards": [{"file": "../x.tar", "samples": 5, "bytes": 1, "sha256": "0" * 64}]}, "shards.0.file"),
    ],
)
def test_wrong_manifest_is_refused_and_named(tmp_path, change, message):
    write_set(tmp_path, 5)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        Manifest.load(tmp_path)
    assert str(path) in str(error.value)
    assert verify(tmp_path) == [str(error.value)]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "\udcff"])
def test_missing_or_incomplete_manifest_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_evaluation_crop_is_the_one_named_center():
    names = [["center", "center-flip"], ["1.1/top-left", "1.1/center"], CROP_NAMES, ["top-left", "center-flip"]]
    assert [CropInfo(scheme="ten", ranges=[1.1], names=n).center for n in names] == [0, 1, 1, 0]
