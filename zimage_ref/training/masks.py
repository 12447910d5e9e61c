"""Masks: which parts of a picture are learned.

White of a mask is learned, black is not, and grey is between them. A mask is NAME.mask.png beside NAME.jpg, or the
alpha of the picture itself. The loss weighs each latent by the mean of the mask over its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np

from zimage_ref.errors import DatasetError, listing
from zimage_ref.formats.tensors import Array
from zimage_ref.pictures.formats import format_of
from zimage_ref.pictures.images import Picture, alpha, brightness, mask_array, mirror, picture_bytes
from zimage_ref.pictures.reading import decode

MASK_SUFFIX = ".mask.png"


def mask_file(picture: Path) -> Path:
    """The name of the file with the mask of `picture`."""
    return picture.with_name(picture.stem + MASK_SUFFIX)


def masks_among(files: Sequence[Path]) -> set[Path]:
    """Those of `files` that are masks: their names say so, and the picture lies beside them."""
    pictures = {mask_file(path) for path in files if format_of(path) and not path.name.lower().endswith(MASK_SUFFIX)}
    return pictures & set(files)


def orphans(files: Sequence[Path], masks: AbstractSet[Path]) -> list[Path]:
    """Those of `files` that are named as masks and are not among `masks`: they have no picture beside them."""
    return [path for path in files if path.name.lower().endswith(MASK_SUFFIX) and path not in masks]


def check_mask(path: Path, size: tuple[int, int]) -> bytes:
    """The content of the mask `path` for a picture of `size`. Raises DatasetError if it does not fit or is black."""
    data = picture_bytes(path)
    mask = decode(data, path).picture
    if mask.size != size:
        raise DatasetError(
            f"{path}: has {mask.width} x {mask.height} pixels, its picture {size[0]} x {size[1]}: give both one size"
        )
    _check_white(brightness(mask), path)
    return data


def check_alpha(picture: Picture, path: Path) -> bool:
    """Whether the picture in `path` has an alpha. Raises DatasetError if it is transparent everywhere."""
    found = alpha(picture)
    if found is not None:
        _check_white(found, path)
    return found is not None


def _check_white(mask: Picture, path: Path) -> None:
    if not np.asarray(mask).any():
        raise DatasetError(f"{path}: the mask is black everywhere, so nothing of the picture would be learned")


def latent_mask(mask: Picture, size: tuple[int, int], flip: bool, factor: int) -> Array:
    """`mask` at latent size, (h, w) float32 in 0..1, after the crop and the mirroring of its picture.

    size: width and height in pixels at which the picture is trained. factor: pixels of a side of a latent.
    """
    pixels = mask_array(mirror(mask) if flip else mask, *size)  # (H, W)
    height, width = pixels.shape
    blocks = pixels.reshape(height // factor, factor, width // factor, factor)
    return np.asarray(blocks.mean(axis=(1, 3)), np.float32)


def unmasked_notice(folder: Path, pictures: Sequence[Path], masks: str) -> str:
    """The notice for pictures without a mask."""
    names = [picture.name for picture in pictures]
    return f"{folder}: pictures without a mask are learned whole (`mask` {masks}; {len(names)}): {listing(names, 5)}"
