"""Crops of an image as in the published extraction: ADM's centre crop, then one, two or ten crops of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from npp_ds.errors import UserError

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
