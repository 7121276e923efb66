"""Crops of an image, as the published extraction makes them: ADM centre crop, then one, two or ten crops of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from npp_ds.errors import UserError

# Places of crops of side S in a square of side R, as (name, top, left) with top and left in units of R - S.
TEN_PLACES = (
    ("top-left", 0.0, 0.0),
    ("top-right", 0.0, 1.0),
    ("bottom-left", 1.0, 0.0),
    ("bottom-right", 1.0, 1.0),
    ("center", 0.5, 0.5),
)
CENTER = (("center", 0.5, 0.5),)
# scheme -> (places, with mirrors, takes ranges)
SCHEMES = {
    "center": (CENTER, False, False),
    "center-flip": (CENTER, True, False),
    "ten": (TEN_PLACES, True, True),
}


def check_scheme(scheme: str, ranges: Sequence[float] = ()) -> None:
    """UserError when `scheme` is unknown, or when it needs crop ranges and has none, or the other way round."""
    if scheme not in SCHEMES:
        raise UserError(f"crops: found {scheme!r}, expected one of {', '.join(SCHEMES)}")
    if not SCHEMES[scheme][2]:
        if ranges:
            raise UserError(f"crop ranges: found {list(ranges)} with crops {scheme!r}; only 'ten' takes ranges")
    elif not ranges or len(set(ranges)) < len(ranges) or not all(1 <= r <= 2 for r in ranges):
        raise UserError(f"crop ranges: found {list(ranges)}, expected different numbers from 1 to 2 (paper: 1.1)")


def crop_names(scheme: str, ranges: Sequence[float] = ()) -> list[str]:
    """One name per crop in the order of `crop`: "center", "center-flip", "1.1/top-left", .., "1.1/center-flip", ..

    A "-flip" crop is taken at that place of the mirrored square, so "top-left-flip" shows the top right corner.
    """
    check_scheme(scheme, ranges)
    places, mirrors, _ = SCHEMES[scheme]
    names = [name for name, _, _ in places]
    names += [f"{name}-flip" for name in names] if mirrors else []
    return [f"{r:g}/{name}" for r in ranges for name in names] if ranges else names


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` of an image whose short side is scaled to `size` (ADM's `center_crop_arr`).

    Halved with BOX while the short side is at least twice `size`, then BICUBIC.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    # Pillow scales rows, then columns; columns that the crop leaves out need not be scaled, and no pixel changes.
    image = image.resize((width, image.height), Image.Resampling.BICUBIC).crop((left, 0, left + size, image.height))
    return image.resize((size, height), Image.Resampling.BICUBIC).crop((0, top, size, top + size))


def square_sides(image_size: int, ranges: Sequence[float] = ()) -> list[int]:
    """Sides of the centre squares that the crops are cut from, in pixels: one per range, or `image_size` alone."""
    return [int(image_size * crop_range) for crop_range in ranges or (1.0,)]


def squares(image: Image.Image, image_size: int, ranges: Sequence[float] = ()) -> list[np.ndarray]:
    """uint8 [side, side, 3] for each of `square_sides`, from an image of any mode."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    return [np.asarray(center_crop(image, side)) for side in square_sides(image_size, ranges)]


@dataclass(frozen=True)
class Window:
    """A crop of side S is `[top : top + S, left : left + S]` of square number `square`, mirrored first or not."""

    square: int
    mirrored: bool
    top: int
    left: int


def windows(image_size: int, scheme: str, ranges: Sequence[float] = ()) -> list[Window]:
    """One per crop, in the order of `crop_names`."""
    check_scheme(scheme, ranges)
    places, mirrors, _ = SCHEMES[scheme]
    return [
        Window(number, mirrored, round((side - image_size) * top), round((side - image_size) * left))
        for number, side in enumerate(square_sides(image_size, ranges))
        for mirrored in (False, True)[: 1 + mirrors]
        for _, top, left in places
    ]


def crop(image: Image.Image, image_size: int, scheme: str, ranges: Sequence[float] = ()) -> np.ndarray:
    """uint8 [crops, image_size, image_size, 3] of an image of any mode; the crops are named by `crop_names`."""
    wanted = windows(image_size, scheme, ranges)
    sources = squares(image, image_size, ranges)
    views = (sources[w.square][:, ::-1] if w.mirrored else sources[w.square] for w in wanted)
    return np.stack(
        [v[w.top : w.top + image_size, w.left : w.left + image_size] for v, w in zip(views, wanted, strict=True)]
    )
