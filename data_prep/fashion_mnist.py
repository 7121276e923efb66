"""Convert Fashion-MNIST's IDX files to WebDataset image shards (32x32 greyscale PNG and cls).

This command made the shipped ones:

    python data_prep/fashion_mnist.py --split test --val-every 10 --out data_prep/fashion_mnist
"""

import argparse
import gzip
import io
import math
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from npp_ds.cli.exit_codes import exit_code_of
from npp_ds.errors import UserError
from npp_ds.utils.files import atomic_file, write_text_atomic

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_PREFIX = {"train": "train", "test": "t10k"}
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PADDING = 2
MOST_BYTES = 1 << 30  # of an unpacked file; those of Fashion-MNIST have 47 MB


def read_idx(path: Path) -> np.ndarray:
    """Read the uint8 array of an IDX file (http://yann.lecun.com/exdb/mnist), plain or gzip. Raises UserError."""
    try:
        with open(path, "rb") as plain, gzip.open(plain) as unpacked:
            compressed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            data = (unpacked if compressed else plain).read(MOST_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or data[3] > 3 or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{path}: not an IDX file of unsigned bytes (starts with {data[:4].hex() or 'nothing'})")
    dimensions = data[3]
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if values.size != math.prod(shape):
        raise UserError(f"{path}: {values.size} values, its header says {shape}; the file is cut off, copy it again")
    return values.reshape(shape)


def find_idx(folder: Path, name: str) -> Path:
    """Return the path of an IDX file, plain or gzip. Raises UserError."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"{folder}: has neither {name} nor {name}.gz; install Debian's package dataset-fashion-mnist, "
        "or give the folder of the IDX files with --idx"
    )


def load_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load images uint8 [N, 32, 32] (28x28 with 2 black pixels on each side) and labels uint8 [N]."""
    images = read_idx(find_idx(folder, f"{IDX_PREFIX[split]}-images-idx3-ubyte"))
    labels = read_idx(find_idx(folder, f"{IDX_PREFIX[split]}-labels-idx1-ubyte"))
    if images.shape != (len(labels), 28, 28):
        raise UserError(f"{folder}: images of shape {images.shape} for {len(labels)} labels, expected [N, 28, 28]")
    return np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING))), labels


def encode_png(image: np.ndarray) -> bytes:
    """Encode an image as uncompressed PNG: gzip compresses a shard better, and no version of zlib changes it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def write_shard(path: Path, samples: Iterator[tuple[str, np.ndarray, int]]) -> None:
    """Write a .tar.gz with fixed times, owner and order, so that equal samples give equal bytes."""
    with (
        atomic_file(path) as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as compressed,
        webdataset.TarWriter(compressed, encoder=False, user="root", group="root", mode=0o644, mtime=0) as tar,
    ):
        for key, image, label in samples:
            tar.write({"__key__": key, "png": encode_png(image), "cls": str(label).encode()})


def convert(folder: Path, split: str, out: Path, val_every: int, samples_per_shard: int) -> dict[str, int]:
    """Write the shards and `classes.txt` into `out`; return the number of images per shard prefix."""
    images, labels = load_split(folder, split)
    ids = np.arange(len(labels))
    if val_every:
        held_out = ids % val_every == val_every - 1
        parts = {"train": ids[~held_out], "val": ids[held_out]}
    else:
        parts = {split: ids}
    out.mkdir(parents=True, exist_ok=True)
    for prefix, members in parts.items():
        for shard, start in enumerate(range(0, len(members), samples_per_shard)):
            rows = members[start : start + samples_per_shard]
            samples = ((f"{split}-{row:05d}", images[row], int(labels[row])) for row in rows)
            write_shard(out / f"{prefix}-{shard:06d}.tar.gz", samples)
    write_text_atomic(out / "classes.txt", "".join(f"{name}\n" for name in CLASS_NAMES))
    return {prefix: len(members) for prefix, members in parts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idx", type=Path, default=DEBIAN_FOLDER, help="folder of the IDX files (%(default)s)")
    parser.add_argument("--split", choices=sorted(IDX_PREFIX), required=True, help="train: 60,000 images; test: 10,000")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--val-every",
        type=int,
        default=0,
        metavar="N",
        help="put every N-th image (index %% N == N - 1) into val-*.tar.gz and the others into train-*.tar.gz; "
        "0: all into <split>-*.tar.gz (%(default)s)",
    )
    parser.add_argument("--samples-per-shard", type=int, default=3000, metavar="N", help="(%(default)s)")
    options = parser.parse_args()
    if options.val_every < 0 or options.val_every == 1 or options.samples_per_shard < 1:
        parser.error("--val-every must be 0 or at least 2, --samples-per-shard at least 1")
    return exit_code_of(lambda: convert_and_report(options))


def convert_and_report(options: argparse.Namespace) -> None:
    counts = convert(options.idx, options.split, options.out, options.val_every, options.samples_per_shard)
    print(f"{options.out}: " + ", ".join(f"{count} images in {prefix}-*.tar.gz" for prefix, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
