"""Images: where each one is stored, how it is read, decoded and cropped. Needs no torch.

Crops are those of the published extraction: ADM's centre crop, then one, two or ten crops of it.
"""

import gzip
import io
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from npp_ds.errors import UserError, is_out_of_memory
from npp_ds.tokenizer.listing import formats
from npp_ds.utils.files import open_regular

MAX_SIDE = 20_000
"""Longest side in pixels of an image that is scaled to a short side of 256. Larger ones are damaged and fill memory."""
MAX_BYTES = 512 << 20
"""Largest encoded image in bytes: 24 bits for each of the 178 million pixels that Pillow decodes at most."""
MAX_KEY_LENGTH = 72
# Positions of crops of side S in a square of side R: (name, top, left), with top and left in units of R - S.
TEN_POSITIONS = (
    ("top-left", 0.0, 0.0),
    ("top-right", 0.0, 1.0),
    ("bottom-left", 1.0, 0.0),
    ("bottom-right", 1.0, 1.0),
    ("center", 0.5, 0.5),
)
CENTER = (("center", 0.5, 0.5),)
# scheme: (positions, with mirrored crops, takes crop ranges)
SCHEMES = {
    "center": (CENTER, False, False),
    "center-flip": (CENTER, True, False),
    "ten": (TEN_POSITIONS, True, True),
}


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
        except (OSError, EOFError, zlib.error) as error:
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
        if is_out_of_memory(error):
            raise
        text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the data", str(error)).replace("\n", " ")
        raise UnreadableImage(text or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB. Of 16-bit grey values the high byte is taken, as Pillow does for 16-bit colours.

    Its own conversion (Pillow 10 to 13) cuts grey values off at 255.
    """
    if image.mode == "RGB":
        return image
    form = image.format
    bits = getattr(image, "tag_v2", {}).get(258, (8,))  # 12-bit TIFFs have mode I;16, too
    if image.mode.startswith("I;16") and form == "TIFF" and bits != (16,):
        raise UnreadableImage(f"TIFF of {bits[0]} bits a value; expected 8 or 16")
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
    last: dict[str, int] = {}  # number of each repeated key
    result = []
    for item in items:
        key = base = _portable(item.key)
        while key in seen:
            last[base] = last.get(base, 1) + 1
            key = f"{base}-{last[base]}"
        seen.add(key)
        result.append(item if key == item.key else replace(item, key=key))
    return result


def _portable(key: str) -> str:
    path = PurePosixPath(key.lstrip("/_") or "image")
    key = (path.parent / path.name.replace(".", "_")).as_posix()
    return "".join(c if c.isascii() and c.isprintable() else "_" for c in key)[-MAX_KEY_LENGTH:].lstrip("/_") or "image"


def check_scheme(scheme: str, ranges: Sequence[float] = ()) -> None:
    """Raise UserError for an unknown scheme, and for crop ranges that are missing, impossible or not for the scheme."""
    if scheme not in SCHEMES:
        raise UserError(f"crops: found {scheme!r}, expected one of {', '.join(SCHEMES)}")
    if not SCHEMES[scheme][2]:
        if ranges:
            raise UserError(f"crop ranges: found {list(ranges)} with crops {scheme!r}; only 'ten' takes ranges")
    elif not ranges or len(set(ranges)) < len(ranges) or not all(1 <= r <= 2 for r in ranges):
        raise UserError(f"crop ranges: found {list(ranges)}, expected different numbers from 1 to 2 (paper: 1.1)")


def crop_names(scheme: str, ranges: Sequence[float] = ()) -> list[str]:
    """Return one name per crop in the order of `crop`: "center", "center-flip", "1.1/top-left", .., "1.1/center-flip".

    A "-flip" crop is taken at that position of the mirrored square, so "top-left-flip" shows the top right corner.
    """
    check_scheme(scheme, ranges)
    positions, mirrored, _ = SCHEMES[scheme]
    names = [name for name, _, _ in positions]
    names += [f"{name}-flip" for name in names] if mirrored else []
    return [f"{r:g}/{name}" for r in ranges for name in names] if ranges else names


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side of an image to `size` and cut out the middle square (ADM's `center_crop_arr`).

    The image is halved with BOX while its short side is at least twice `size`, then scaled with BICUBIC.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    # Pillow scales horizontally, then vertically. Cropping in between leaves less to scale and changes no pixel.
    image = image.resize((width, image.height), Image.Resampling.BICUBIC).crop((left, 0, left + size, image.height))
    return image.resize((size, height), Image.Resampling.BICUBIC).crop((0, top, size, top + size))


def square_sides(image_size: int, ranges: Sequence[float] = ()) -> list[int]:
    """Return the sides in pixels of the centre squares to cut crops from: one per range, or `image_size` alone."""
    return [int(image_size * crop_range) for crop_range in ranges or (1.0,)]


def squares(image: Image.Image, image_size: int, ranges: Sequence[float] = ()) -> list[np.ndarray]:
    """Return the centre square uint8 [side, side, 3] of each of `square_sides`, of an image of any mode."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    return [np.asarray(center_crop(image, side)) for side in square_sides(image_size, ranges)]


@dataclass(frozen=True)
class Window:
    """The crop `[top : top + S, left : left + S]` of side S of a square, which is mirrored first or not."""

    square: int
    mirrored: bool
    top: int
    left: int


def windows(image_size: int, scheme: str, ranges: Sequence[float] = ()) -> list[Window]:
    """Return the window of each crop in the order of `crop_names`."""
    check_scheme(scheme, ranges)
    positions, mirrored, _ = SCHEMES[scheme]
    return [
        Window(number, flip, round((side - image_size) * top), round((side - image_size) * left))
        for number, side in enumerate(square_sides(image_size, ranges))
        for flip in (False, True)[: 1 + mirrored]
        for _, top, left in positions
    ]


def crop(image: Image.Image, image_size: int, scheme: str, ranges: Sequence[float] = ()) -> np.ndarray:
    """Return uint8 [crops, image_size, image_size, 3] of an image of any mode, in the order of `crop_names`."""
    wanted = windows(image_size, scheme, ranges)
    sources = squares(image, image_size, ranges)
    views = (sources[w.square][:, ::-1] if w.mirrored else sources[w.square] for w in wanted)
    return np.stack(
        [v[w.top : w.top + image_size, w.left : w.left + image_size] for v, w in zip(views, wanted, strict=True)]
    )
