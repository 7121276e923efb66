"""Encoded images: where each one is stored, how it is read and decoded. Needs no torch."""

import gzip
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from npp_ds.errors import UserError
from npp_ds.tokenizer.listing import formats
from npp_ds.utils.files import open_regular

MAX_SIDE = 20_000
"""Longest side in pixels of an image that is scaled to a short side of 256. Larger ones are damaged and fill memory."""
MAX_BYTES = 512 << 20
"""Largest encoded image in bytes: 24 bits for each of the 178 million pixels that Pillow decodes at most."""
MAX_KEY_LENGTH = 72


class UnreadableImage(Exception):
    """An image that cannot be read or decoded; the text is the reason."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One encoded image: `size` bytes at `offset` of the (decompressed) file at `path`.

    `name` is its name in that file, if the file is an archive; `problem` is the reason if it is known to be unreadable.
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
        """The path for messages: that of the archive, then the name in it."""
        return f"{self.path}/{self.name}" if self.name else self.path


class ImageReader:
    """Reads items. The file of the last one stays open, because consecutive items mostly share it."""

    def __init__(self) -> None:
        self._path = ""
        self._file: BinaryIO | None = None

    def read(self, item: ImageItem) -> bytes:
        """Return the encoded image.

        Raises UnreadableImage if it is unreadable, UserError if the source has changed since it was listed.
        """
        if item.problem or not item.size:
            raise UnreadableImage(item.problem or "empty: 0 bytes")
        if item.size > MAX_BYTES:
            raise UnreadableImage(f"{item.size} bytes, expected at most {MAX_BYTES}")
        try:
            file = self._open(item.path)
            file.seek(item.offset)
            data = file.read(item.size if item.name else item.size + 1)
        except PermissionError as error:
            raise UnreadableImage(error.strerror) from error
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{item.where}: could not be read ({reason}); rerun the same command") from error
        if len(data) != item.size:
            raise UserError(f"{item.where}: not the {item.size} bytes that were listed; rerun the same command")
        return data

    def close(self) -> None:
        """Close the file that is open; the reader can be used again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: str) -> BinaryIO:
        if self._file is None or path != self._path:
            self.close()
            self._file, self._path = open_decompressed(path), path
        return self._file


def open_decompressed(path: str | Path) -> BinaryIO:
    """Open a file for reading; one whose name ends in .gz is decompressed. Raises OSError for a pipe or a device."""
    file = open_regular(path)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if str(path).endswith(".gz") else file


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB; its `format` is that of the data. EXIF rotation is ignored, as in the published pipeline.

    Raises UnreadableImage, also for more than twice Pillow's MAX_IMAGE_PIXELS (178 million pixels in all).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats())
            short, long = sorted(image.size)
            if long * 256 > MAX_SIDE * short:
                raise UnreadableImage(f"{image.width} x {image.height} pixels: too long for a centre crop")
            image.load()
            return _to_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"not an image: begins with {data[:8]!r}") from error
    except Exception as error:  # for damaged data, the decoders of Pillow 11 raise exceptions of many types
        text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the data", str(error)).replace("\n", " ")
        raise UnreadableImage(text or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB. Of 16-bit grey values the high byte is taken, as Pillow does for 16-bit colours.

    Its own conversion (Pillow 10 to 13) cuts grey values off at 255.
    """
    if image.mode == "RGB":
        return image
    form = image.format
    if image.mode.startswith("I;16") or (image.mode == "I" and form in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableImage(f"{form} of 32-bit or float values, whose range is not known; expected 8 or 16 bits")
    image = image.convert("RGB")
    image.format = form
    return image


def decoded_images(items: Iterable[ImageItem]) -> Iterator[tuple[ImageItem, Image.Image]]:
    """Yield the items with their RGB images, in order. Raises UserError for an unreadable one."""
    with closing(ImageReader()) as reader:
        for item in items:
            try:
                yield item, decode(reader.read(item))
            except UnreadableImage as error:
                raise UserError(f"{item.where}: {error}") from error


def with_unique_keys(items: Iterable[ImageItem]) -> list[ImageItem]:
    """Make keys that any tar reader accepts, numbered where two images have the same one (`a.png` and `a.jpg`)."""
    seen: set[str] = set()
    result = []
    for item in items:
        key = base = _portable(item.key)
        number = 1
        while key in seen:
            number += 1
            key = f"{base}-{number}"
        seen.add(key)
        result.append(item if key == item.key else replace(item, key=key))
    return result


def _portable(key: str) -> str:
    path = PurePosixPath(key.lstrip("/_") or "image")
    key = (path.parent / path.name.replace(".", "_")).as_posix()
    return "".join(c if c.isascii() and c.isprintable() else "_" for c in key)[-MAX_KEY_LENGTH:].lstrip("/_")
