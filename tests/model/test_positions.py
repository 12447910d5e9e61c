"""Position ids and RoPE angles, against values worked out by hand from the official code."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny

from zimage_ref.errors import ConfigError
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.positions import caption_ids, image_ids, padded, rope_angles


def test_lengths_are_padded_to_multiples_of_thirty_two() -> None:
    assert [padded(n) for n in (0, 1, 31, 32, 33, 64)] == [0, 32, 32, 32, 64, 64]


def test_caption_tokens_count_from_one_through_their_padding() -> None:
    ids = caption_ids(5)
    assert ids.shape == (32, 3)
    assert ids[:, 0].tolist() == list(range(1, 33))
    assert not ids[:, 1:].any()


def test_a_picture_of_three_by_two_follows_its_caption_and_its_padding_stands_at_the_origin() -> None:
    ids = image_ids(3, 2, caption_length=5)
    assert ids.shape == (32, 3)
    assert ids[:6].tolist() == [[33, 0, 0], [33, 0, 1], [33, 1, 0], [33, 1, 1], [33, 2, 0], [33, 2, 1]]
    assert not ids[6:].any()


def test_a_picture_that_needs_no_padding_has_none() -> None:
    assert image_ids(4, 8, caption_length=33).tolist()[-1] == [65, 3, 7]


def test_angles_are_position_times_frequency_axis_by_axis() -> None:
    angles = rope_angles(np.array([[3, 5, 7]], np.int32), tiny.NARROW)  # axes_dims 4, 2, 6; theta 100
    expected = [3 * 1, 3 * 0.1, 5 * 1, 7 * 1, 7 * 100 ** (-1 / 3), 7 * 100 ** (-2 / 3)]
    np.testing.assert_allclose(angles, [expected], rtol=1e-7)
    assert angles.dtype == np.float32


def test_full_size_heads_have_sixty_four_pairs() -> None:
    assert rope_angles(caption_ids(3), OFFICIAL_TRANSFORMER).shape == (32, 64)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_position_beyond_the_table_is_refused(axis: int) -> None:
    ids = np.zeros((1, 3), np.int32)
    ids[0, axis] = tiny.NARROW.axes_lens[axis] - 1
    rope_angles(ids, tiny.NARROW)
    ids[0, axis] += 1
    with pytest.raises(ConfigError, match=f"position {ids[0, axis]} on axis {axis}"):
        rope_angles(ids, tiny.NARROW)
