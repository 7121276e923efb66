"""Folders, tars and images as strangers leave them: refused in one line, or taken and all that is left out counted."""

import gzip
import io
import os
import re
import runpy
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import assert_printable, assert_refused, run_limited
from PIL import Image, features

from image_sets import add, encoded, save_tiny_tokenizer, write_tree
from npp_ds.data.manifest import Manifest
from npp_ds.data.shards import verify
from npp_ds.tokenizer.images import MAX_BYTES, ImageItem, ImageReader, UnreadableImage, decode
from npp_ds.tokenizer.listing import passed_over_text

SCRIPT = str(Path(__file__).parents[2] / "data_prep" / "tokenize_imagenet.py")
RAMP = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None], 3, axis=2)
PNG = encoded(RAMP)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny.safetensors")


def words(images: Path, tokenizer: Path, *more: str) -> list[str]:
    options = {"images": images, "out": images.parent / "out", "tokenizer": tokenizer, "image-size": 16}
    options |= {"crops": "center", "batch-size": 4, "workers": 0, "device": "cpu"}
    return [*(str(part) for name, value in options.items() for part in (f"--{name}", value)), *more]


def tree(folder: Path, **files: bytes) -> Path:
    """folder/train/<class>/<image> with two good images of two classes, then the `files`."""
    return write_tree(folder, {"a/1.png": PNG, "b/2.png": PNG, **files})


def link(name: str, target: str, folder: Path) -> None:
    tree(folder)
    (folder / "train" / name).symlink_to(target)


def two_links(folder: Path) -> None:
    link("a/one", ".", folder)
    (folder / "train/a/two").symlink_to(".")


def many_ways(folder: Path) -> None:
    """Thirty folders with two links each to the next one: a billion paths, and no loop."""
    tree(folder)
    for depth in range(30):
        (folder / f"d{depth}").mkdir()
        for name in "xy" if depth < 29 else "":
            (folder / f"d{depth}" / name).symlink_to(folder / f"d{depth + 1}")
    (folder / "train/a/deep").symlink_to(folder / "d0")


def class_tar(folder: Path) -> None:
    folder.mkdir()
    name, outer = "\x1b[2J.tar", folder / "ILSVRC2012_img_train.tar"
    outer.write_bytes(tar_bytes((name, tar_bytes(("1.png", PNG)))))


def numbered(folder: Path) -> None:
    write_tree(folder, {f"{number}/1.png": PNG for number in range(12)})
    (folder / "train/classes.txt").write_text("\n".join(f"class {number}" for number in range(12)))


def tar_bytes(*members: tuple[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for name, data in members:
            add(tar, name, data)
    return buffer.getvalue()


def shard(*members: tuple[str, bytes], compressed: bool = False) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        folder.mkdir()
        data = tar_bytes(*members)
        (folder / f"train-0.tar{'.gz' if compressed else ''}").write_bytes(
            gzip.compress(data, 1) if compressed else data
        )

    return build


def fifo(path: str, folder: Path) -> None:
    tree(folder)
    os.mkfifo(folder / path)


def class_named(name: str, folder: Path) -> None:
    tree(folder)
    os.mkdir(os.path.join(os.fsencode(folder / "train"), os.fsencode(name)))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "class folder links to nothing": (partial(link, "c", "nowhere"), "train/c: a link to nowhere"),
    "class folder links to itself": (partial(link, "c", "c"), "train/c: a link to c"),
    "class folder links to the root": (partial(link, "c", "."), "train/c: the same folder as"),
    "class folder links above the root": (partial(link, "c", "../.."), "the same folder as"),
    "folder links to its class": (partial(link, "a/self", "."), "train/a/self: the same folder as"),
    "two links to the class": (two_links, ": the same folder as"),
    "folder of one class links to another": (partial(link, "a/more", "../b"), "train/b: the same folder as"),
    "class folder links to another": (partial(link, "c", "b"), "train/c: the same folder as"),
    "a billion paths without a loop": (many_ways, ": the same folder as"),
    "no folder": (lambda folder: folder.mkdir(), "found neither shards"),
    "only litter": (lambda folder: write_tree(folder, {"@eaDir/1.png": PNG, ".x/1.png": PNG}), "found neither shards"),
    "classes without images": (lambda folder: write_tree(folder, {"a/x.txt": b"1", "b/y.heic": b"1"}), "no images"),
    "names alone for numbered folders": (numbered, "0, 1, 10, 11 and 8 more"),
    "class of no UTF-8": (partial(class_named, "\udcff"), "has control characters or is no UTF-8"),
    "class with an escape sequence": (partial(class_named, "c\x1b[2J"), "has control characters or is no UTF-8"),
    "class tar with an escape sequence": (class_tar, "has control characters or is no UTF-8"),
    "class list that never ends": (partial(link, "classes.txt", "/dev/zero"), "classes.txt: no list of class names"),
    "shard that is a pipe": (partial(fifo, "train-0.tar"), "train-0.tar: not a plain file"),
    "class list that is a folder": (lambda folder: (tree(folder) / "list.txt").mkdir(), "no list of class names"),
    "huge cls": (
        shard(("x.png", PNG), ("x.cls", bytes(64 << 20)), compressed=True),
        "x: cls is b'\\x00\\x00",
    ),
    "cls with much space": (shard(("x.png", PNG), ("x.cls", b"3" + b" " * 40)), "expected a label as text"),
    "label of thirty nines": (shard(("x.png", PNG), ("x.cls", b"9" * 30)), "below 1000000"),
    "negative label": (shard(("x.png", PNG), ("x.cls", b"-1")), "cls is b'-1'"),
    "empty cls": (shard(("x.png", PNG), ("x.cls", b"")), "cls is b''"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_certain_classes_or_no_end_is_refused_with_one_line(name, tokenizer, tmp_path):
    build, phrase = REFUSED[name]
    build(images := tmp_path / "images")
    more = ["--class-list", str(images / "list.txt")] if (images / "list.txt").exists() else []
    assert_refused(*words(images, tokenizer, *more), program=SCRIPT, phrase=phrase)
    assert not (tmp_path / "out" / "manifest.json").exists()


def litter(folder: Path) -> None:
    names = [
        "@eaDir/1.png",
        "__MACOSX/a/1.png",
        "a/@eaDir/1.png",
        "a/.ipynb_checkpoints/1.png",
        "a/._1.png",
        "b/Thumbs.db",
    ]
    names += ["lost+found/x.png", "$RECYCLE.BIN/x.png", "b/deep/.DS_Store", ".DS_Store", "b/deep/desktop.ini"]
    tree(folder, **dict.fromkeys(names, PNG))


def other_names(folder: Path) -> None:
    good = {"jfif": "JPEG", "jpe": "JPEG", "gif": "GIF", "bmp": "BMP", "TIFF": "TIFF", "ppm": "PPM"}
    good |= {name: form for name, form, feature in OPTIONAL if features.check(feature)}
    files = {f"a/x.{name}": encoded(RAMP, form) for name, form in good.items()}
    files |= {"a/plain": PNG, "a/photo": encoded(RAMP, "JPEG"), "a/README": b"text", "a/n.txt": b"1", "b/h.heic": b"2"}
    tree(folder, **files, **{"b/e.eps": b"%!PS-Adobe-3.0"})


def linked_class(folder: Path) -> None:
    link("c", "../other", folder)
    (folder / "other").mkdir()


def deep(folder: Path) -> None:
    path = tree(folder) / "train/b"
    for _ in range(1200):
        path = path / "d"
        path.mkdir()
    (path / "3.png").write_bytes(PNG)


TAR_LITTER = [("._x.png", b"mac"), ("__MACOSX/y.cls", b"7"), ("x.png", PNG), ("x.cls", b"0"), ("README", b"hi")]
OPTIONAL = [("avif", "AVIF", "avif"), ("jp2", "JPEG2000", "jpg_2000"), ("webp", "WEBP", "webp")]
TAKEN: dict[str, tuple[Callable[[Path], object], int, int, str]] = {
    "litter at every depth": (litter, 2, 0, "ignored: 11 (hidden or left by a system)"),
    "litter in a tar": (shard(*TAR_LITTER), 1, 0, "ignored: 2 (hidden or left by a system), 1 (sample without"),
    "other names of images": (
        other_names,
        2 + 6 + sum(features.check(feature) for _, _, feature in OPTIONAL) + 2,
        0,
        "1 (not an image: .eps), 1 (not an image: .heic), 1 (not an image: .txt), 1 (not an image: no known extension)",
    ),
    "folders in 1200 folders": (deep, 3, 0, ""),
    "names of no UTF-8": (lambda f: (tree(f) / "train/a/\udcff\n.png").write_bytes(PNG), 3, 0, ""),
    "an empty class": (lambda f: (tree(f) / "train/empty").mkdir(), 2, 0, "no images of 1 classes (empty)"),
    "a class beyond ASCII": (lambda f: (tree(f) / "train/ü").mkdir(), 2, 0, "no images of 1 classes (ü)"),
    "an image that links to itself": (partial(link, "a/x.JPEG", "x.JPEG"), 2, 1, "1 image skipped"),
    "a link to nothing": (partial(link, "a/lost", "nowhere"), 2, 1, "1 image skipped"),
    "a pipe among images": (partial(fifo, "train/a/x.png"), 2, 1, "1 image skipped"),
    "a device among images": (partial(link, "a/x.png", "/dev/zero"), 2, 1, "1 image skipped"),
    "a pipe without an extension": (partial(fifo, "train/a/pipe"), 2, 1, "1 image skipped"),
    "Ghostscript's input": (
        lambda f: tree(f, **{"a/x.JPEG": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9"}),
        2,
        1,
        "",
    ),
    "an image beside the classes": (lambda f: tree(f, **{"3.png": PNG}), 2, 0, "1 (image beside the class folders)"),
    "a class that links elsewhere": (linked_class, 2, 0, "no images of 1 classes (c)"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_left_out_is_said_in_the_closing_line_and_the_manifest(name, tokenizer, tmp_path, request):
    build, taken, skipped, phrase = TAKEN[name]
    # pytest 9.0 removes old folders by recursion, which 1200 levels exceed
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", tmp_path / "images"], check=True))
    build(tmp_path / "images")
    line = words(tmp_path / "images", tokenizer, "--max-skipped", "0.5")
    done = run_limited(*line, program=SCRIPT)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.num_samples, len(manifest.skipped)) == (taken, skipped), done.stdout
    assert phrase in done.stdout and len(done.stdout.splitlines()) == 1 and verify(tmp_path / "out") == []
    assert_printable(done.stdout + done.stderr)
    assert passed_over_text(manifest.source.get("passed_over", {})) in done.stdout


def test_a_terminal_without_the_letters_of_a_class_gets_escapes(tokenizer, tmp_path, monkeypatch):
    (tree(tmp_path / "images") / "train/ü").mkdir()
    monkeypatch.setattr(sys, "argv", [SCRIPT, *words(tmp_path / "images", tokenizer)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed := io.BytesIO(), encoding="ascii"))
    assert runpy.run_path(SCRIPT)["main"]() == 0
    assert b"no images of 1 classes (\\xfc)" in printed.getvalue()


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_what_becomes_of_the_closing_line_is_no_failure_of_a_complete_set(output, tokenizer, tmp_path):
    tree(tmp_path / "images")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing if output == "closed pipe" else "/dev/full", "w", closefd=output == "full disk") as stdout:
        line = [sys.executable, SCRIPT, *words(tmp_path / "images", tokenizer)]
        done = subprocess.run(line, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "") and verify(tmp_path / "out") == []


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, mode: int = 0) -> bytes:
    """A PNG whose header claims this size, with hardly any data."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_of(bits: int) -> bytes:
    """A grey TIFF of 8x8 pixels."""
    data = bytes(8 * 8 * bits // 8)
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


GREY = RAMP[..., 0].astype(np.uint16)
FLOATS = Image.fromarray(RAMP[..., 0].astype(np.float32))
UNREADABLE = {
    "float TIFF": (saved(FLOATS, "TIFF"), "TIFF of 32-bit or float values"),
    "32-bit TIFF": (saved(Image.fromarray(RAMP[..., 0].astype(np.int32)), "TIFF"), "TIFF of 32-bit or float values"),
    "float PFM": (saved(FLOATS, "PPM"), "PPM of 32-bit or float values"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image: begins with b'%!PS-Ado'"),
    "icon": (saved(Image.new("RGB", (16, 16)), "ICO"), "not an image"),
    "200 Mpixel": (png_of(20_000, 10_000), "exceeds limit of 178956970 pixels"),
    "2 Gpixel": (png_of(45_000, 45_000), "exceeds limit of 178956970 pixels"),
    "cut off": (PNG[:60], "truncated"),
    "12-bit TIFF": (tiff_of(12), "TIFF of 12 bits a value"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_images_of_no_known_range_other_formats_and_bombs_are_unreadable(name):
    data, reason = UNREADABLE[name]
    with pytest.raises(UnreadableImage, match=re.escape(reason)):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(GREY * 257), "PNG"),
        saved(Image.fromarray(GREY << 8), "PNG"),
        saved(Image.fromarray(GREY * 257), "TIFF"),
        saved(Image.fromarray((GREY * 257).astype(">u2")), "TIFF"),
        b"P5 16 16 65535\n" + (GREY * 257).astype(">u2").tobytes(),
    ],
    ids=["PNG", "PNG, low byte 0", "TIFF", "big-endian TIFF", "PGM"],
)
def test_16_bit_grey_is_within_one_level_of_its_8_bit_twin(data):
    found = np.asarray(decode(data)).astype(int)
    assert found.shape == RAMP.shape and np.abs(found - RAMP).max() <= 1


def test_no_more_is_read_than_the_largest_image_takes(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    os.truncate(tmp_path / "x.png", 1 << 40)
    with pytest.raises(UnreadableImage, match=f"expected at most {MAX_BYTES}"):
        ImageReader().read(ImageItem("x", 0, str(tmp_path / "x.png"), 1 << 40))


@pytest.mark.parametrize(
    "name, build, phrase",
    [
        ("images", two_links, ": the same folder as"),
        ("images", partial(fifo, "train/a/x.png"), "a/x.png: not a plain file"),
        ("images", partial(link, "a/x.png", "nowhere"), "a/x.png: No such file"),
        ("images", partial(fifo, "train-0.tar"), "train-0.tar: damaged, or no tar file"),
        ("images/x.npz", partial(fifo, "x.npz"), "x.npz: no readable .npz file"),
        ("images/x.png", partial(fifo, "x.png"), "x.png: a pipe or a device"),
    ],
)
def test_references_with_loops_and_pipes_are_refused(name, build, phrase, tmp_path):
    build(tmp_path / "images")
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    line = ("evaluate", "--samples", tmp_path / "samples.npz", "--reference", tmp_path / name)
    assert_refused(*line, "--extractor", "fashion_mnist", phrase=phrase)
