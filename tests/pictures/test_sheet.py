"""Sheets of pictures with labels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from zimage_ref.pictures import sheet
from zimage_ref.pictures.sheet import Sheet


def test_a_picture_of_another_size_is_scaled_and_centred() -> None:
    made = Sheet(["one", "two"], [""], (64, 64))
    made.add(1, Image.new("RGB", (128, 64), (255, 0, 0)))
    red = (np.asarray(made.picture) == (255, 0, 0)).all(axis=2)
    assert red.sum() == 64 * 32 and red[:, : red.shape[1] // 2].sum() == 0


def test_long_labels_stay_within_their_cell() -> None:
    words = "a very long prompt that names far more things than a label can hold, " * 9
    made = Sheet([words, "x" * 400], [words], (128, 96))
    assert made.picture.width < 128 * 3.6 and made.picture.height < 96 * 2.5


def test_a_sheet_is_never_too_large(monkeypatch) -> None:
    monkeypatch.setattr(sheet, "_LARGEST", 40_000)
    made = Sheet(list("abcdefghij"), list("klmnopqrst"), (256, 128))
    assert made.picture.width * made.picture.height < 200_000
