"""Reads shapes, colours and background from the pixels of a picture, to count how often a model draws its prompt.

It knows the shapes and colours of `drawings`. It does not know how a picture was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from zimage_ref.formats.tensors import Array
from zimage_ref.pictures.images import Picture

from .drawings import COLOURS, OUTLINES, Scene, Thing, draw

_MASK = 32  # outlines are compared at this side, in pixels
_LARGEST = 0.5  # a shape covers at most this share of the picture
CONTRAST, SMALLEST = 55.0, 60  # see `look`
OVERLAP = 0.6  # a shape is in its place if its intersection over union with the drawn one is above this


@dataclass(frozen=True)
class Seen:
    """The content of a picture: the colour of the background, and the shape and the colour of each patch on it."""

    ground: str
    things: tuple[tuple[str, str], ...]  # (shape, colour); the shape is "" if no known shape is similar


def look(picture: Picture, contrast: float = CONTRAST, smallest: int = SMALLEST, alike: float = 0.72) -> Seen:
    """Reads a picture of SIDE x SIDE.

    contrast: a pixel at least this far from the background, in RGB levels, belongs to a patch.
    smallest: a patch has at least this many pixels.
    alike: a patch has a shape if its intersection over union with the drawn shape is at least this.
    """
    ground, patches = _seen_patches(picture, contrast, smallest)
    return Seen(_nearest(ground), tuple((_shape(inside, alike), _nearest(colour)) for inside, colour in patches))


def _seen_patches(picture: Picture, contrast: float, smallest: int) -> tuple[Array, list[tuple[Array, Array]]]:
    """The colour of the background, and each patch on it: a mask (SIDE, SIDE) and its colour. Colours are RGB levels.

    contrast, smallest: see `look`.
    """
    pixels = np.asarray(picture.convert("RGB"), np.float32)  # (SIDE, SIDE, 3)
    sides = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
    frame = np.concatenate([side.reshape(-1, 3) for side in sides])
    ground: Array = np.median(frame, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    labels = _patches(distance > contrast)
    sizes = np.bincount(labels.ravel())
    seen = []
    for patch in (labels == i for i in np.flatnonzero(sizes >= smallest) if i):
        core = patch & (distance >= np.median(distance[patch]))  # without the edge, because colours mix there
        colour: Array = np.median(pixels[core], axis=0)
        # A blurred edge changes gradually into the background. The outline is at half of that change
        seen.append((patch & (distance > np.linalg.norm(colour - ground) / 2), colour))
    return ground, seen


def shows(seen: Seen, scene: Scene) -> bool:
    """Whether the picture shows the background and all things of the scene (shape and colour), and no other things."""
    wanted = sorted((thing.shape, thing.colour) for thing in scene.things)
    return seen.ground == scene.ground and sorted(seen.things) == wanted


def share_shown(pictures: Sequence[Picture], scenes: Sequence[Scene]) -> float:
    """The share of pictures that show their scene: picture i should show scene i."""
    return sum(shows(look(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)) / len(scenes)


def in_place(picture: Picture, scene: Scene) -> bool:
    """Whether each thing of the scene has a patch of the picture in its place, whatever the colours."""
    _, patches = _seen_patches(picture, CONTRAST, SMALLEST)
    return all(
        any((inside & mask).sum() > OVERLAP * (inside | mask).sum() for inside, _ in patches)
        for mask in map(_mask_of, scene.things)
    )


def share_in_place(pictures: Sequence[Picture], scenes: Sequence[Scene]) -> float:
    """The share of pictures with every thing of their scene in its place: picture i is of scene i."""
    return sum(in_place(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)) / len(scenes)


def _nearest(rgb: Array) -> str:
    palette = np.array(list(COLOURS.values()), np.float32)
    return list(COLOURS)[int(np.argmin(np.linalg.norm(palette - rgb, axis=-1)))]


def _patches(mask: Array) -> Array:
    """Labels (SIDE, SIDE) of the connected patches in a boolean mask, 1 and up; 0 outside.

    Each pixel begins with its own index. The largest index spreads through its patch until nothing changes.
    """
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = _along_rows(_along_rows(labels).T).T
        if (spread == labels).all():
            return np.unique(labels, return_inverse=True)[1].reshape(mask.shape)
        labels = spread


def _along_rows(labels: Array) -> Array:
    """Each label replaced by the largest label in its unbroken run of a row."""
    begins = np.ones(labels.shape, bool)
    begins[:, 1:] = (labels[:, 1:] > 0) != (labels[:, :-1] > 0)
    first = np.flatnonzero(begins)
    lengths = np.diff(np.append(first, labels.size))
    return np.repeat(np.maximum.reduceat(labels.ravel(), first), lengths).reshape(labels.shape)


def _shape(patch: Array, alike: float) -> str:
    mask = _cut(patch)
    scores = {name: (mask & known).sum() / (mask | known).sum() for name, known in _known_masks().items()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= alike and patch.mean() < _LARGEST else ""


def _cut(patch: Array) -> Array:
    """The square around the patch, as (_MASK, _MASK) boolean. The patch keeps its proportions."""
    rows, columns = np.flatnonzero(patch.any(1)), np.flatnonzero(patch.any(0))
    box = patch[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(box.shape)
    square = np.zeros((side, side), bool)
    top, left = (side - box.shape[0]) // 2, (side - box.shape[1]) // 2
    square[top : top + box.shape[0], left : left + box.shape[1]] = box
    return np.asarray(Image.fromarray(square).convert("L").resize((_MASK, _MASK), Image.Resampling.BOX)) > 127


@lru_cache(maxsize=1)
def _known_masks() -> dict[str, Array]:
    return {name: _cut(_mask_of(Thing(name, "black", radius=40))) for name in OUTLINES}


def _mask_of(thing: Thing) -> Array:
    """The pixels of a thing, (SIDE, SIDE) boolean."""
    scene = Scene((replace(thing, colour="black"),), "white", "")
    mask: Array = np.asarray(draw(scene, np.random.default_rng(0)).convert("L")) < 128
    return mask
