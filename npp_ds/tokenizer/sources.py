"""Where images come from: an ordered list of `ImageItem`s, each a range of bytes in some file.

A new kind of source is a function in `listing.py` and a line in `open_source`. Needs no torch.
"""

import gzip
import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from npp_ds.errors import UserError
from npp_ds.tokenizer.class_list import read_class_list
from npp_ds.tokenizer.crops import crop

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
SHARD_SUFFIXES = (".tar", ".tar.gz")
KINDS = ("webdataset", "imagefolder", "imagenet-tar")
CLASSES_FILE = "classes.txt"
KEY_LENGTH = 72
LARGEST_SIDE = 20_000  # of an image scaled to a short side of 256; beyond it lies damage, and much memory


class UnreadableImage(Exception):
    """An image that has no pixels to give; the text is the reason."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One encoded image: `size` bytes at `offset` of the (decompressed) file at `path`, where it is called `name`.

    `problem` says why it cannot be read, when that is known already.
    """

    key: str
    label: int
    path: str
    size: int
    offset: int = 0
    name: str = ""
    problem: str = ""

    @property
    def where(self) -> str:
        """The path for people: that of a member goes on behind that of its archive."""
        return f"{self.path}/{self.name}" if self.name else self.path


@dataclass(frozen=True)
class Source:
    """Images in a fixed order; `class_names` may be empty, then labels are only known to be below `num_classes`."""

    kind: str
    name: str
    items: list[ImageItem]
    class_names: list[str]
    num_classes: int

    @property
    def bytes(self) -> int:
        """Size of all encoded images."""
        return sum(item.size for item in self.items)

    def describe(self) -> dict:
        """What the manifest says of the source; its fingerprint covers keys, labels and sizes, not where it lies."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.key}\t{item.label}\t{item.size}\n".encode())
        return {
            "kind": self.kind,
            "name": self.name,
            "images": len(self.items),
            "bytes": self.bytes,
            "fingerprint": digest.hexdigest(),
        }


def open_source(
    images: Sequence[str | Path], split: str, class_list: str | Path | None = None, kind: str = "auto"
) -> Source:
    """Image shards (a folder with `<split>-*.tar` or .tar.gz, or such files), an ImageFolder tree (with or without a
    `<split>` folder) or ImageNet's tar of one tar per class (the file, or a folder with ILSVRC2012_img_<split>.tar).

    `kind` is one of KINDS, or auto. UserError when nothing fits, or when labels and class list disagree.
    """
    from npp_ds.tokenizer import listing

    paths = [Path(path) for path in images]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: not there; expected a folder of images or of image shards, or tar files")
    kind, found = listing.find(paths, split, kind)
    folders: list[str] = []
    if kind == "webdataset":
        items = listing.list_shards(found)
        name, beside = found[0].parent.name, found[0].parent / CLASSES_FILE
    elif kind == "imagefolder":
        items, folders = listing.list_image_folder(found[0])
        name, beside = found[0].name, found[0] / CLASSES_FILE
    else:
        items, folders = listing.list_imagenet_tar(found[0])
        name, beside = found[0].name, found[0].parent / CLASSES_FILE
    names = read_class_list(class_list or beside, folders) if class_list or beside.is_file() else folders
    highest = max(items, key=lambda item: item.label)
    if names and highest.label >= len(names):
        raise UserError(f"{highest.where}, {highest.key}: label {highest.label}, but only {len(names)} class names")
    return Source(kind, name, _with_unique_keys(items), names, len(names) or highest.label + 1)


class ImageReader:
    """Reads items; the file of the last one stays open, because neighbours mostly share it."""

    def __init__(self) -> None:
        self._path = ""
        self._stack = ExitStack()

    def read(self, item: ImageItem) -> bytes:
        """The encoded image. UnreadableImage when it has none; UserError when the source is no longer as listed."""
        if item.problem or not item.size:
            raise UnreadableImage(item.problem or "empty: 0 bytes")
        try:
            if item.path != self._path:
                self._open(item.path)
            self._file.seek(item.offset)
            data = self._file.read(item.size if item.name else -1)
        except PermissionError as error:
            raise UnreadableImage(error.strerror) from error
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{item.where}: could not be read ({reason}); run the same command again") from error
        if len(data) != item.size:
            raise UserError(f"{item.where}: {len(data)} bytes now, {item.size} when the images were listed; run again")
        return data

    def _open(self, path: str) -> None:
        self.close()
        self._file = self._stack.enter_context(open(path, "rb"))  # noqa: SIM115 - closed by close()
        if path.endswith(".gz"):
            self._file = self._stack.enter_context(gzip.GzipFile(fileobj=self._file))
        self._path = path

    def close(self) -> None:
        self._path = ""
        self._stack.close()


def decode(data: bytes) -> Image.Image:
    """RGB image of an encoded one; EXIF rotation is left alone, as the published pipeline does. UnreadableImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            short, long = sorted(image.size)
            if long * 256 > LARGEST_SIDE * short:
                raise UnreadableImage(f"{image.width} x {image.height} pixels: too long for a centre crop")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"not an image: begins with {data[:8]!r}") from error
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data
        text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the data", str(error)).replace("\n", " ")
        raise UnreadableImage(text or type(error).__name__) from error


def decoded_images(items: Iterable[ImageItem]) -> Iterator[tuple[ImageItem, Image.Image]]:
    """The items with their RGB images, in order; UserError for one that cannot be read."""
    reader = ImageReader()
    try:
        for item in items:
            try:
                yield item, decode(reader.read(item))
            except UnreadableImage as error:
                raise UserError(f"{item.where}: {error}") from error
    finally:
        reader.close()


def load_images(source: Source, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images as centre crops uint8 [N, image_size, image_size, 3] and labels int64 [N]; for small sets."""
    images = np.empty((len(source.items), image_size, image_size, 3), np.uint8)
    for row, (_, image) in enumerate(decoded_images(source.items)):
        images[row] = crop(image, image_size, "center")[0]
    return images, np.array([item.label for item in source.items])


def _with_unique_keys(items: Iterable[ImageItem]) -> list[ImageItem]:
    """Keys that any tar reader takes, numbered where two images would share one (`a.png` beside `a.jpg`)."""
    seen: set[str] = set()
    result = []
    for item in items:
        key = base = _plain(item.key)
        number = 1
        while key in seen:
            number += 1
            key = f"{base}-{number}"
        seen.add(key)
        result.append(item if key == item.key else replace(item, key=key))
    return result


def _plain(key: str) -> str:
    path = PurePosixPath(key.lstrip("/_") or "image")
    key = (path.parent / path.name.replace(".", "_")).as_posix()
    return "".join(c if c.isascii() and c.isprintable() else "_" for c in key)[-KEY_LENGTH:].lstrip("/_")
