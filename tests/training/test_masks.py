"""Masks: a LoRA learns what is white in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.training_runs import PLAIN, Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx

from zimage_mlx.training.loss import NoisyBatch
from zimage_ref import DatasetError
from zimage_ref.training.dataset import Example, fingerprint, list_dataset
from zimage_ref.training.dataset_options import DatasetSettings
from zimage_ref.training.masks import latent_mask

FILE, ALPHA = DatasetSettings(mask="file"), DatasetSettings(mask="alpha")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("masks"))


def half(width: int, height: int, left: int = 255, right: int = 0) -> Image.Image:
    """A mask whose left half has one brightness, the right half another."""
    mask = Image.new("L", (width, height), right)
    mask.paste(left, (0, 0, width // 2, height))
    return mask


def test_a_latent_weighs_the_mean_of_its_pixels_after_crop_and_mirror() -> None:
    mask = np.zeros((16, 24), np.uint8)
    mask[:8, :8] = np.arange(64).reshape(8, 8) * 4  # the first latent
    mask[8:, 16:] = 255  # the last one
    found = latent_mask(Image.fromarray(mask), (24, 16), flip=False, factor=8)
    np.testing.assert_allclose(found, [[126 / 255, 0, 0], [0, 0, 1]], atol=1e-6)
    np.testing.assert_array_equal(latent_mask(Image.fromarray(mask), (24, 16), True, 8), found[:, ::-1])
    wide = half(64, 16)  # of a crop to 16 x 16 at the centre, the left half is white
    np.testing.assert_allclose(latent_mask(wide, (16, 16), False, 8), [[1, 0], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(latent_mask(wide, (16, 16), True, 8), [[0, 1], [0, 1]], atol=1e-6)


def test_the_loss_is_the_mean_weighted_by_the_mask() -> None:
    rng = np.random.default_rng(0)
    raw, x_0, noise = (rng.standard_normal((2, 4, 3, 5), dtype=np.float32) for _ in range(3))
    mask = rng.random((2, 1, 3, 5), dtype=np.float32)
    weight = np.array([0.5, 2.0], np.float32)
    squares = (raw - (x_0 - noise)) ** 2
    each = [(m * s).sum() / (4 * m.sum()) for m, s in zip(mask, squares, strict=True)]
    batch = NoisyBatch(mx.array(x_0), mx.array(noise), mx.array([0.5, 0.5]), [], mx.array(weight), mx.array(mask))
    assert batch.error(mx.array(raw)).item() == pytest.approx(np.mean(weight * each), rel=1e-5)


def masked_run(shop: Workshop, name: str, left: int, right: int, **options: object) -> np.ndarray:
    """All B after one step of plain descent on a picture with a mask of two halves."""
    data = pictures(shop.folder / f"{name}-data", (32, 32))
    half(32, 32, left, right).save(data / "p0000.mask.png")
    return shop.train(name, **PLAIN, dataset=data, mask="file", steps=1, **options).vector("B")


def test_gradients_of_the_parts_of_a_picture_add_up_to_that_of_the_whole(shop: Workshop) -> None:
    """The mean of all is half that of the left and half that of the right: only if each part counts alone."""
    left = masked_run(shop, "left", 255, 0, mask_outside=0.0)
    right = masked_run(shop, "right", 0, 255, mask_outside=0.0)
    data = pictures(shop.folder / "whole-data", (32, 32))
    whole = shop.train("whole", **PLAIN, dataset=data, steps=1).vector("B")
    np.testing.assert_allclose((left + right) / 2, whole, atol=0.02 * np.abs(whole).max())
    assert np.abs(left - right).max() > 0.2 * np.abs(whole).max()
    outside = masked_run(shop, "outside", 255, 0, mask_outside=0.25)  # (1 left + 0.25 right) / 1.25
    np.testing.assert_allclose((left + 0.25 * right) / 1.25, outside, atol=0.02 * np.abs(whole).max())


def test_the_alpha_of_a_picture_is_a_mask_by_option(shop: Workshop) -> None:
    data = pictures(shop.folder / "alpha-data", (32, 32))
    picture = Image.open(data / "p0000.png").convert("RGBA")
    picture.putalpha(half(32, 32))
    picture.save(data / "p0000.png")
    flat = pictures(shop.folder / "flat-data", (32, 32))
    white = Image.new("RGBA", (32, 32), "white")
    Image.alpha_composite(white, picture).convert("RGB").save(flat / "p0000.png")
    half(32, 32).save(flat / "p0000.mask.png")
    own = shop.train("alpha", **PLAIN, dataset=data, mask="alpha", steps=1)
    beside = shop.train("beside", **PLAIN, dataset=flat, mask="file", steps=1)
    none = shop.train("no-mask", **PLAIN, dataset=data, steps=1)
    assert own.losses == beside.losses != none.losses
    bare = shop.train("bare", **PLAIN, mask="alpha", steps=1)
    assert "pictures without a mask are learned whole (`mask` alpha; 4): photo0.png, " in bare.notices


def test_masks_go_with_flips_buckets_and_the_cache(shop: Workshop) -> None:
    """A mirrored picture with a mirrored mask is the picture that `flip` makes."""
    data, mirrored = (pictures(shop.folder / f"flips-{n}", (64, 32)) for n in ("plain", "mirrored"))
    half(64, 32).save(data / "p0000.mask.png")
    for name in ("p0000.png", "p0000.mask.png"):
        Image.open(data / name).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored / name)
    options = {**PLAIN, "mask": "file", "epochs": 3, "lr": 1e-9, "resolution": (32, 48)}
    plain, other = (shop.train(f"f-{d.name}", dataset=d, **options).losses for d in (data, mirrored))
    flipped = shop.train("f-flip", dataset=data, **options, flip=True).losses
    assert plain != other
    pairs = list(zip(flipped, plain, other, strict=True))
    assert all(f == pytest.approx(p, rel=1e-5) or f == pytest.approx(o, rel=1e-5) for f, p, o in pairs)
    assert {f == pytest.approx(p, rel=1e-5) for f, p, _ in pairs} == {True, False}
    again = shop.train("f-again", dataset=data, **options)
    assert again.losses == plain  # from the cache


def test_masks_are_told_from_pictures_and_faults_are_named(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (40, 30))
    half(40, 30).save(data / "p0000.mask.png")
    half(40, 30).save(data / "gone.mask.png")
    told: list[str] = []
    (listed,) = list_dataset(data, "", told.append, masks=True)
    assert listed[0].name == "p0000.png" and "left out 1 (a mask without a picture): gone.mask.png" in told[0]
    (data / "gone.mask.png").unlink()
    told.clear()
    assert len(list_dataset(data, "", told.append)) == 1
    assert told == [f"{data}: left out 1 (a mask: `mask` file uses it): p0000.mask.png"]
    assert Example.open(*listed).mask is None
    half(30, 40).save(data / "p0000.mask.png")
    with pytest.raises(DatasetError, match=r"p0000\.mask\.png: has 30 x 40 pixels, its picture 40 x 30"):
        Example.open(*listed, settings=FILE)
    Image.new("L", (40, 30)).save(data / "p0000.mask.png")
    with pytest.raises(DatasetError, match=r"p0000\.mask\.png: the mask is black everywhere"):
        Example.open(*listed, settings=FILE)
    Image.new("RGBA", (40, 30)).save(data / "p0000.png")
    with pytest.raises(DatasetError, match=r"p0000\.png: the mask is black everywhere"):
        Example.open(*listed, settings=ALPHA)


def test_another_mask_is_another_dataset(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (32, 32))
    digests = []
    for mask in (half(32, 32), half(32, 32, 0, 255)):
        mask.save(data / "p0000.mask.png")
        digests.append(fingerprint([Example.open(*list_dataset(data, masks=True)[0], settings=FILE)]))
    digests.append(fingerprint([Example.open(*list_dataset(data)[0])]))
    assert len(set(digests)) == 3
