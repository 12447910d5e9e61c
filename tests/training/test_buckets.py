"""Sizes at which pictures are trained, and the order in which they come."""

from __future__ import annotations

from collections import Counter

import pytest

from zimage_ref.training.batches import BatchOrder, Item
from zimage_ref.training.buckets import bucket, buckets


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((1000, 1000), 256, (256, 256)),
        ((1500, 1000), 512, (624, 416)),  # 3:2, a multiple of 16
        ((1000, 1500), 512, (416, 624)),
        ((4000, 1000), 512, (1024, 256)),
        ((1920, 1080), 1024, (1360, 768)),
        ((1000, 1000), 300, (304, 304)),  # the larger of two that cut off nothing
    ],
)
def test_a_bucket_has_the_area_of_the_resolution_and_the_shape_of_the_picture(size, resolution, expected) -> None:
    assert bucket(size, resolution, 16) == expected
    assert 0.9 < expected[0] * expected[1] / resolution**2 < 1.1


def test_no_picture_is_enlarged_beyond_the_limit() -> None:
    for width in range(16, 400, 7):
        for height in range(16, 400, 11):
            for limit in (1.0, 1.5):
                w, h = bucket((width, height), 256, 16, limit)
                assert w % 16 == h % 16 == 0
                assert max(w / width, h / height) <= limit
    assert bucket((100, 100), 512, 16, max_upscale=1.0) == (96, 96)
    assert bucket((100, 100), 512, 16, max_upscale=2.0) == (192, 192)
    assert bucket((5, 40), 512, 16) == (16, 32)  # a side below the multiple has to grow


def test_several_resolutions_give_several_sizes_but_none_twice() -> None:
    assert buckets((2000, 1000), [256, 512], 16, 1.0, square=False) == [(352, 176), (736, 368)]
    assert buckets((300, 300), [256, 512, 768], 16, 1.0, square=False) == [(256, 256), (288, 288)]
    assert buckets((300, 200), [256, 512], 16, 1.0, square=True) == [(256, 256), (512, 512)]


ITEMS = [Item(i, (32, 32) if i % 3 else (48, 16)) for i in range(11)]  # 7 of one size, 4 of the other


def test_an_epoch_shows_every_item_once_in_batches_of_one_size() -> None:
    batches = BatchOrder(ITEMS, batch_size=3, accumulation=2, seed=5)
    assert batches.sizes() == {(48, 16): 4, (32, 32): 7}
    for epoch in range(4):
        steps = batches.epoch(epoch)
        assert len(steps) == batches.steps_per_epoch == 3  # 2 + 3 batches, two to a step
        flat = [batch for step in steps for batch in step]
        assert sorted(item for batch in flat for item in batch) == list(range(11))
        assert sorted(map(len, flat)) == [1, 1, 3, 3, 3]  # what is left over is used
        assert all(len({ITEMS[item].size for item in batch}) == 1 for batch in flat)


def test_order_differs_between_epochs_and_seeds_and_is_the_same_from_any_step_on() -> None:
    batches = BatchOrder(ITEMS, batch_size=2, accumulation=1, seed=5)
    assert batches.epoch(0) != batches.epoch(1) != BatchOrder(ITEMS, 2, 1, seed=6).epoch(1)
    assert Counter(map(len, batches.epoch(0)[0])).total() == 1
    whole = [step for _, step in zip(range(20), batches.since(0), strict=False)]
    for start in (1, 5, 6, 7, 13):
        assert [step for _, step in zip(range(20 - start), batches.since(start), strict=False)] == whole[start:]
    assert [epoch for epoch, _ in whole] == [i // batches.steps_per_epoch for i in range(20)]
