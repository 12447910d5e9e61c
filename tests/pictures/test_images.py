"""A picture before a network sees it: orientation, transparency, depth, crop and filter, pixel by pixel."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from support import tiny

from zimage_ref.pictures.images import (
    black_and_white,
    cover,
    encoded,
    fit,
    fit_mask,
    flat,
    mirror,
    read_picture,
    to_array,
    to_picture,
    to_unit,
)  # fmt: skip

# Where the first pixel of a 4 x 2 file stands when it is upright: EXIF 2.3, tag 274
UPRIGHT = {
    1: ((4, 2), (0, 0)), 2: ((4, 2), (3, 0)), 3: ((4, 2), (3, 1)), 4: ((4, 2), (0, 1)),
    5: ((2, 4), (0, 0)), 6: ((2, 4), (1, 0)), 7: ((2, 4), (1, 3)), 8: ((2, 4), (0, 3)),
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    size, first = UPRIGHT[orientation]
    upright = read_picture(tmp_path / "a.png")
    assert upright.size == size and upright.getpixel(first) == (255, 0, 0)
    assert np.asarray(upright).sum() == 255  # the others are black


def test_transparent_parts_are_white() -> None:
    picture = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(10, 20, 30, 0), (0, 0, 0, 128), (10, 20, 30, 255)]):
        picture.putpixel((x, 0), pixel)
    assert [flat(picture).getpixel((x, 0)) for x in range(3)] == [(255,) * 3, (127,) * 3, (10, 20, 30)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    palette.info["transparency"] = 0
    assert flat(palette).getpixel((0, 0)) == (255,) * 3
    assert black_and_white(Image.new("RGBA", (1, 1), (255, 255, 255, 0))).getpixel((0, 0)) == 0  # of a mask, black


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(read_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("turned", [False, True])
def test_a_crop_shows_the_middle(turned: bool) -> None:
    bands = np.repeat(np.array([10, 100, 200], np.uint8), 20)[:, None, None] * np.ones((1, 20, 3), np.uint8)
    picture = Image.fromarray(bands.transpose(1, 0, 2) if turned else bands)
    assert picture.size == ((60, 20) if turned else (20, 60))
    for cropped in (cover(picture, 16, 16), fit(picture, 16, 16, "crop")):
        shown = np.asarray(cropped)
        assert shown.shape == (16, 16, 3) and np.abs(shown[2:-2, 2:-2].astype(int) - 100).max() <= 2


def test_scaling_is_lanczos() -> None:
    picture = tiny.photograph(64, 64, 3)
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS))
    for scaled in (cover(picture, 16, 16), fit(picture, 16, 16, "stretch"), fit(picture, 16, 16, "pad")):
        np.testing.assert_array_equal(np.asarray(scaled), expected)


def test_padding_is_black_for_a_picture_and_white_for_its_mask() -> None:
    padded = np.asarray(fit(Image.new("RGB", (20, 20), "red"), 40, 20, "pad"))
    assert padded[10, 5].tolist() == [0, 0, 0] and padded[10, 20].tolist() == [255, 0, 0]
    mask = fit_mask(Image.new("L", (20, 20), 0), 40, 20, "pad")
    assert mask[10, 5] and not mask[10, 20] and mask.shape == (20, 40)


def test_a_mask_is_white_from_half_brightness_on() -> None:
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert np.asarray(black_and_white(grey)).tolist() == [[0, 0, 255, 255]]
    np.testing.assert_array_equal(fit_mask(black_and_white(grey), 4, 1, "stretch"), [[False, False, True, True]])


def test_pixels_become_numbers_and_numbers_pixels() -> None:
    picture = Image.new("RGB", (3, 2))
    picture.putpixel((2, 0), (255, 51, 0))
    array = to_array(picture)
    assert array.shape == (3, 2, 3) and array.dtype == np.float32
    np.testing.assert_allclose(array[:, 0, 2], [1, -0.6, -1], atol=1e-6)
    assert array[0, 1, 2] == -1
    np.testing.assert_array_equal(np.asarray(to_picture(to_unit(array))), np.asarray(picture))
    assert np.asarray(to_picture(np.full((1, 1, 3), 0.4999 / 255 + 100 / 255, np.float32)))[0, 0, 0] == 100
    np.testing.assert_array_equal(to_unit(np.array([[[-3.0]], [[3.0]], [[0.0]]]))[0, 0], [0, 1, 0.5])
    assert mirror(picture).getpixel((0, 0)) == (255, 51, 0)


def test_a_jpeg_is_of_high_quality() -> None:
    with Image.open(io.BytesIO(encoded(tiny.photograph(64, 64, 5), "JPEG"))) as jpeg:
        assert jpeg.quantization[0][0] == 2  # the step of the mean of a block: 8 at Pillow's own quality
