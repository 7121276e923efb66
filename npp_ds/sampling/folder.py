"""What sampling writes: images in one .npy, PNG files, a picture of a grid of images, and the record beside them."""

import csv
import hashlib
import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from npp_ds.errors import UserError
from npp_ds.utils.files import open_regular, read_json, write_atomic, write_json_atomic, write_text_atomic
from npp_ds.utils.hub import CONFIG_FILE, WEIGHTS_FILE

SAMPLES_FILE, RECORD_FILE, GRID_FILE = "samples.npz", "samples.json", "grid.png"
EVALUATION_FILE = "evaluation.json"
PNG_FOLDER, LABELS_FILE = "images", "labels.csv"


def write_samples(
    directory: str | Path,
    images: Iterable[np.ndarray],
    labels: np.ndarray,
    record: dict[str, Any],
    class_names: Sequence[str] = (),
) -> None:
    """Write samples.npz (`arr_0` uint8 [N, H, W, 3], as ADM's evaluator reads it; `labels`), grid.png, samples.json.

    `images` is uint8 [N, H, W, 3], or yields the parts of such an array in order, of which one is in memory at a time.
    Each file appears complete or not at all. samples.json is written last, so it shows that the others are complete.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD_FILE).unlink(missing_ok=True)
    write_atomic(directory / SAMPLES_FILE, lambda file: _write_npz(file, images, labels))
    written = map_array(directory / SAMPLES_FILE, "arr_0")
    write_atomic(directory / GRID_FILE, lambda file: sample_grid(written, labels, class_names).save(file, "PNG"))
    write_json_atomic(directory / RECORD_FILE, {**record, "repeated_images": repeated_images(written)})


def _write_npz(file: BinaryIO, images: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write what np.savez writes, but without the time, so that equal images make equal files."""
    parts = iter(images)
    first = next(parts)
    shape, written = (len(labels), *first.shape[-3:]), 0
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
            _write_header(entry, shape)
            for part in chain([first], parts):
                written += entry.write(np.ascontiguousarray(part, dtype=np.uint8).data)
        assert written == np.prod(shape), f"{written} bytes of images for the shape {shape}"
        with archive.open(zipfile.ZipInfo("labels.npy"), "w", force_zip64=True) as entry:
            np.lib.format.write_array(entry, np.asarray(labels), allow_pickle=False)


def write_npy(file: BinaryIO, images: np.ndarray) -> None:
    """Write uint8 images as np.save does. np.save itself ignores a full disk (numpy 2.4, small arrays)."""
    _write_header(file, images.shape)
    file.write(images.data)


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def map_array(path: str | Path, name: str = "arr_0") -> np.ndarray:
    """Return an array of an .npz file, memory-mapped if it is stored uncompressed (np.savez, `npp sample`).

    A compressed array is read whole. Writing to the result changes nothing on disk. Raises KeyError, ValueError,
    OSError or BadZipFile if there is no such array, or if it is larger than the memory.
    """
    try:
        return _map_array(path, name)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile):
        raise
    except Exception as error:  # zipfile, its decompressors and numpy raise many kinds for damaged files
        raise ValueError(f"{type(error).__name__}: {error!s:.200}") from None


def _map_array(path: str | Path, name: str) -> np.ndarray:
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        entry = archive.getinfo(f"{name}.npy")
        file.seek(entry.header_offset + 26)  # in the local header: 30 bytes, then a name and an extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)
        if entry.compress_type == zipfile.ZIP_STORED and np.lib.format.read_magic(file) == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if not fortran_order and not dtype.hasobject:
                return np.memmap(path, dtype, "c", file.tell(), shape)
        if entry.file_size > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            raise ValueError(f"{name} has {entry.file_size:,} bytes, this machine {memory:,} of memory")
        with archive.open(entry) as data:
            return np.lib.format.read_array(data, allow_pickle=False)


def load_samples(directory: str | Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return (images, labels, record) as `write_samples` wrote them. The images are memory-mapped.

    Raises UserError if the folder holds no finished samples.
    """
    directory = Path(directory)
    try:
        record = read_json(directory / RECORD_FILE)
        images, labels = (map_array(directory / SAMPLES_FILE, name) for name in ("arr_0", "labels"))
        _check_samples(images, labels, record)
        return images, np.array(labels), record
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{directory}: no finished samples ({error}); expected {SAMPLES_FILE} and {RECORD_FILE}, run `npp sample`"
        ) from None


def _check_samples(images: np.ndarray, labels: np.ndarray, record: Any) -> None:
    """Raise ValueError for content that `write_samples` cannot have written."""
    if not isinstance(record, dict):
        raise ValueError(f"{RECORD_FILE} is no record but {str(record)[:40]!r}")
    tokenizer = record.get("tokenizer", {"name": ""})
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("name"), str):
        raise ValueError(f"{RECORD_FILE} has a tokenizer without a name: {str(tokenizer)[:40]!r}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{SAMPLES_FILE} has arr_0 {images.dtype} {images.shape} and labels {labels.shape}")


def samples_of(source: str | Path) -> Path:
    """Return the folder for samples: `samples/` in a run folder; for a file or hub folder `samples/<name>` here."""
    source = Path(source)
    folder = source.parent if source.name == WEIGHTS_FILE else source
    if (folder / CONFIG_FILE).is_file():
        return Path("samples", folder.resolve().name)
    return source / "samples" if source.is_dir() else Path("samples", source.stem)


def newest_samples(source: str | Path) -> Path:
    """Return the last finished folder of samples of a run or a file. Raises UserError if there is none."""
    folder = samples_of(source)
    newest = newest_record(folder, RECORD_FILE)
    if newest is None:
        if not Path(source).exists():
            raise UserError(f"{source}: not found; expected a run folder or a file of weights")
        raise UserError(f"{source}: has no samples; expected some in {folder}, run `npp sample {source}`")
    return newest.parent


def newest_record(folder: Path, name: str, is_wanted: Callable[[dict[str, Any]], bool] | None = None) -> Path | None:
    """Return the newest of the JSON records folder/*/`name` by their own time, which a copy of the folder keeps.

    Records that have none, as earlier versions wrote them, come first, by checkpoint step and name. `is_wanted` takes
    the content of a record; those for which it raises, as it may for damaged ones, are not wanted.
    """

    def wanted(path: Path) -> bool:
        try:
            return is_wanted is None or is_wanted(read_json(path))
        except (OSError, ValueError, TypeError, AttributeError, LookupError):
            return False

    return max(filter(wanted, folder.glob(f"*/{name}")), key=_age, default=None)


def _age(path: Path) -> tuple[str, int, str]:
    """Return what orders records, the oldest first; a damaged one is older than all others."""
    try:
        record = read_json(path)
        step = record.get("checkpoint_step", record.get("samples", {}).get("checkpoint_step"))
        return str(record.get("finished_at", "")), -1 if step is None else int(step), path.parent.name
    except (OSError, ValueError, TypeError, AttributeError):
        return "", -2, path.parent.name


def write_pngs(directory: str | Path, images: Iterable[np.ndarray], numbers: Iterable[int]) -> None:
    """Write images uint8 [H, W, 3] as images/000000.png .. by their `numbers`, each file complete or not at all."""
    folder = Path(directory) / PNG_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for image, number in zip(images, numbers, strict=True):
        write_atomic(folder / png_name(number), partial(Image.fromarray(image).save, format="PNG"))


def complete_pngs(directory: str | Path, class_names: Sequence[str] = ()) -> None:
    """Write the missing PNGs of finished samples, then labels.csv with file, class and class name."""
    directory = Path(directory)
    images, labels, _ = load_samples(directory)
    existing = {path.name for path in (directory / PNG_FOLDER).glob("*.png")}
    missing = [i for i in range(len(images)) if png_name(i) not in existing]
    write_pngs(directory, (images[i] for i in missing), missing)
    for leftover in (directory / PNG_FOLDER).glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if missing or not (directory / LABELS_FILE).is_file():
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["file", "class", "name"])
        rows.writerows([png_name(i), c, class_names[c] if class_names else ""] for i, c in enumerate(labels.tolist()))
        write_text_atomic(directory / LABELS_FILE, table.getvalue())


def png_name(number: int) -> str:
    """Return the file name of an image number."""
    return f"{number:06d}.png"


def repeated_images(images: Iterable[np.ndarray]) -> int:
    """Return how many images equal an earlier one in all pixels. Compares 128-bit hashes, one image at a time."""
    digests = list(map(pixel_digest, images))
    return len(digests) - len(set(digests))


def pixel_digest(image: np.ndarray) -> bytes:
    """Return a 128-bit hash of the pixels of an image."""
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()


MARGIN, GAP, FONT_SIZE = 8, 2, 15


def sample_grid(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] = (),
    per_row: int = 10,
    max_rows: int = 20,
    min_cell: int = 64,
) -> Image.Image:
    """Return an RGB picture of images uint8 [N, H, W, 3] with labels int [N].

    Each of the first `max_rows` classes, in the order of their numbers, has a row with its first `per_row` images.
    Images smaller than `min_cell` are enlarged by a whole factor without smoothing, so each pixel stays visible.
    """
    classes = np.unique(labels)[:max_rows]
    rows = [images[np.flatnonzero(labels == c)[:per_row]] for c in classes]
    names = [class_names[c] if c < len(class_names) else f"class {c}" for c in classes]
    height, width = images.shape[1:3]
    factor = max(1, -(-min_cell // min(height, width)))
    font = ImageFont.load_default(FONT_SIZE)
    left = MARGIN + int(max(font.getlength(name) for name in names)) + MARGIN
    step_x, step_y = width * factor + GAP, height * factor + GAP
    columns = max(len(row) for row in rows)
    picture = Image.new("RGB", (left + columns * step_x + MARGIN, 2 * MARGIN + len(rows) * step_y), "white")
    draw = ImageDraw.Draw(picture)
    for r, (name, row) in enumerate(zip(names, rows, strict=True)):
        top = MARGIN + r * step_y
        draw.text((left - MARGIN, top + step_y // 2), name, fill="black", font=font, anchor="rm")
        for c, image in enumerate(row):
            cell = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            picture.paste(cell, (left + c * step_x, top))
    return picture


def tiled(images: np.ndarray, per_row: int) -> Image.Image:
    """Return a picture of images uint8 [N, H, W, 3] side by side in their order; the rest of the last row is white."""
    count, height, width = images.shape[:3]
    picture = Image.new("RGB", (min(per_row, count) * width, -(-count // per_row) * height), "white")
    for i, image in enumerate(images):
        picture.paste(Image.fromarray(image), (i % per_row * width, i // per_row * height))
    return picture
