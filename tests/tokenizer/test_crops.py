"""Crops agree with the published extraction pipeline, pixel by pixel and in order."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npp_ds.errors import UserError
from npp_ds.tokenizer.images import center_crop, crop, crop_names

VECTORS = np.load(Path(__file__).parents[1] / "data" / "ten_crop.npz")
CASES = [name.removeprefix("input_") for name in VECTORS.files if name.startswith("input_")]


@pytest.mark.parametrize("case", CASES)
def test_ten_crops_equal_the_published_ones_pixel_by_pixel(case):
    _, size, crop_range = case.split("_")
    crops = crop(Image.fromarray(VECTORS[f"input_{case}"]), int(size), "ten", [float(crop_range)])
    expected = VECTORS[f"crops_{case}"]
    assert crops.dtype == np.uint8 and crops.shape == expected.shape
    assert np.array_equal(crops, expected)


def test_twenty_crops_are_the_ten_of_each_range_in_the_order_given():
    image = Image.fromarray(VECTORS["input_97x80_64_1.05"])
    crops = crop(image, 64, "ten", [1.1, 1.05])
    assert np.array_equal(crops[10:], crop(image, 64, "ten", [1.05]))
    names = crop_names("ten", [1.1, 1.05])
    assert len(names) == len(set(names)) == 20
    assert names[:5] == ["1.1/top-left", "1.1/top-right", "1.1/bottom-left", "1.1/bottom-right", "1.1/center"]
    assert names[14] == "1.05/center" and names[19] == "1.05/center-flip"


def test_names_say_what_the_crops_show():
    ramp = np.zeros((80, 80, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(80)[:, None], np.arange(80)[None]
    by_name = dict(zip(crop_names("ten", [1.25]), crop(Image.fromarray(ramp), 64, "ten", [1.25]), strict=True))
    origins = {name: tuple(view[0, 0, :2].tolist()) for name, view in by_name.items()}
    assert origins["1.25/top-left"] == (0, 0) and origins["1.25/bottom-right"] == (16, 16)
    assert origins["1.25/top-right"] == (0, 16) and origins["1.25/center"] == (8, 8)
    assert origins["1.25/top-left-flip"] == (0, 79) and origins["1.25/bottom-right-flip"] == (16, 63)


def test_a_square_image_of_the_wanted_size_is_its_own_center_crop():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    crops = crop(Image.fromarray(pixels), 32, "center-flip")
    assert crop_names("center-flip") == ["center", "center-flip"] and crop_names("center") == ["center"]
    assert np.array_equal(crops[0], pixels) and np.array_equal(crops[1], pixels[:, ::-1])


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_every_image_mode_gives_rgb_crops(mode):
    image = Image.fromarray(VECTORS["input_150x200_64_1.1"]).convert(mode)
    assert crop(image, 64, "ten", [1.1]).shape == (10, 64, 64, 3)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (33, 500), (2000, 31)])
def test_extreme_shapes_still_give_a_full_square(size):
    assert center_crop(Image.new("RGB", size, (9, 9, 9)), 32).size == (32, 32)


@pytest.mark.parametrize(
    "scheme, ranges", [("five", []), ("ten", []), ("ten", [0.9]), ("ten", [1.1, 1.1]), ("center", [1.1])]
)
def test_impossible_crop_settings_are_refused_with_what_was_found(scheme, ranges):
    with pytest.raises(UserError, match=r"found"):
        crop_names(scheme, ranges)
