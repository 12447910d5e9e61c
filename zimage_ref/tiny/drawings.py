"""Captioned pictures of coloured shapes, for training and testing the tiny model. `judge` reads such pictures.

A scene is one to three shapes on a plain background. `draw` paints it, `describe` puts it into words. One in ten
combinations of shape, colour and background is held out of training. A glyph is a shape with a made-up name; no
training scene holds a glyph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from zimage_ref.formats.tensors import Array

SIDE = 128  # pixels
COLOURS = {
    "red": (214, 39, 40), "orange": (250, 133, 30), "yellow": (248, 218, 48), "green": (44, 150, 60),
    "blue": (38, 92, 214), "purple": (128, 52, 168), "pink": (248, 152, 196), "gray": (136, 136, 136),
    "black": (22, 22, 22), "white": (246, 246, 246),
}  # fmt: skip
SIZES = {"small": 20.0, "": 25.0, "big": 31.0}  # radius in pixels
PLACES = {
    "in the top left corner": (38, 38), "at the top": (64, 38), "in the top right corner": (90, 38),
    "on the left": (38, 64), "in the middle": (64, 64), "on the right": (90, 64),
    "in the bottom left corner": (38, 90), "at the bottom": (64, 90), "in the bottom right corner": (90, 90),
}  # fmt: skip
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = {2: "two", 3: "three"}
FORMS = (
    "{subject} on a {ground} background", "{subject} on a {ground} background", "{subject} on {ground}",
    "{ground} background, {subject}", "{subject}, {ground} background", "on a {ground} background, {subject}",
    "a picture of {subject} on a {ground} background", "a drawing of {subject} on {ground}",
)  # fmt: skip

_APART = 32  # pixels from the middle of the picture to each of two shapes
_JITTER = 5  # colours vary by up to this many levels from picture to picture


def _ellipse(radius: float) -> Array:
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], -1)


def _star(points: int, inner: float) -> Array:
    angle = np.arange(2 * points) * np.pi / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    star: Array = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return star


def _heart() -> Array:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], -1) / 15


def _polygon(*points: tuple[float, float]) -> Array:
    return np.array(points)


# name -> outlines about within the unit circle, y downwards: the first is filled, the others are holes in it
_Outlines = dict[str, list[Array]]
SHAPES: _Outlines = {
    "circle": [_ellipse(0.95)],
    "square": [_polygon((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))],
    "triangle": [_polygon((0, -0.95), (1, 0.8), (-1, 0.8))],
    "diamond": [_polygon((0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0))],
    "star": [1.1 * _star(5, 0.5)],
    "ring": [_ellipse(1.0), _ellipse(0.55)],
    "cross": [_polygon(
        (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
        (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
    )],
    "heart": [_heart()],
}  # fmt: skip
GLYPHS: _Outlines = {
    "zorp": [_polygon((-0.9, -1), (0.9, -1), (0.22, 0), (0.9, 1), (-0.9, 1), (-0.22, 0))],  # an hourglass
    "blick": [_polygon((0, -1.1), (1, 0), (0.36, 0), (0.36, 1), (-0.36, 1), (-0.36, 0), (-1, 0))],  # an arrow upwards
    "quam": [_polygon(
        (-0.95, -1), (-0.35, -1), (-0.35, -0.3), (0.35, -0.3), (0.35, -1), (0.95, -1),
        (0.95, 1), (0.35, 1), (0.35, 0.3), (-0.35, 0.3), (-0.35, 1), (-0.95, 1),
    )],  # a letter H
}  # fmt: skip
OUTLINES = SHAPES | GLYPHS


@dataclass(frozen=True)
class Thing:
    """One shape of a picture."""

    shape: str
    colour: str
    x: float = SIDE / 2  # the centre, in pixels
    y: float = SIDE / 2
    radius: float = SIZES[""]


@dataclass(frozen=True)
class Scene:
    """A picture to draw, and the words for its things (without the background)."""

    things: tuple[Thing, ...]
    ground: str
    subject: str

    @property
    def held_out(self) -> bool:
        """Whether the scene has a combination that is held out of training."""
        return any(held_out(thing.shape, thing.colour, self.ground) for thing in self.things)


def held_out(shape: str, colour: str, ground: str) -> bool:
    """Whether the combination is held out. One in ten is, and training still shows every pair of the three."""
    return (
        shape in SHAPES
        and (list(SHAPES).index(shape) + 3 * list(COLOURS).index(colour) + 7 * list(COLOURS).index(ground)) % 10 == 0
    )


def scenes(rng: np.random.Generator, held_out: bool = False) -> Iterator[Scene]:
    """Endless random scenes. Either all of them are held out of training, or none of them."""
    while True:
        kind = (_single, _several, _pair)[np.searchsorted((0.5, 0.65), rng.uniform())]
        scene = kind(rng)
        if scene.held_out == held_out:
            yield scene


def take(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """The first `count` scenes of a seed."""
    return [scene for scene, _ in zip(scenes(np.random.default_rng(seed), held_out), range(count), strict=False)]


def illustrated(scenes: Iterable[Scene], seed: int) -> Iterator[tuple[Image.Image, str]]:
    """Each scene as a picture and its caption."""
    rng = np.random.default_rng(seed)
    for scene in scenes:
        yield draw(scene, rng), describe(scene, rng)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in one of several wordings."""
    return articles(_pick(rng, FORMS).format(subject=scene.subject, ground=scene.ground))


def articles(text: str) -> str:
    """`text` with "an" before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def made_up_word(rng: np.random.Generator) -> str:
    """A word of three to six letters that names no shape and no glyph."""
    while True:
        letters = ("bcdfghjklmnpqrstvwz", "aeiou")
        word = "".join(_pick(rng, letters[i % 2]) for i in range(rng.integers(3, 7)))
        if word not in OUTLINES:
            return word


def draw(scene: Scene, rng: np.random.Generator, scale: int = 3) -> Image.Image:
    """The scene as an RGB picture, SIDE x SIDE. Colours vary a little; `scale` smooths the edges."""
    ground = _shade(scene.ground, rng)
    picture = Image.new("RGB", (SIDE * scale, SIDE * scale), ground)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        ink = _shade(thing.colour, rng)
        for i, outline in enumerate(OUTLINES[thing.shape]):
            points = (outline * thing.radius + (thing.x, thing.y)) * scale
            pen.polygon([(float(x), float(y)) for x, y in points], fill=ground if i else ink)
    return picture.reduce(scale)


def lesson(word: str) -> list[Scene]:
    """Eight scenes that teach `word`, the name of a glyph. Two of them hold another shape too."""
    scenes = [_alone(word, colour, ground, size, place) for colour, ground, size, place in _ALONE]
    for (colour, ground), (other, its_colour), relation in _TOGETHER:
        dx, dy = RELATIONS[relation]
        x, y = SIDE / 2 + _APART * dx, SIDE / 2 + _APART * dy
        things = (Thing(word, colour, x, y), Thing(other, its_colour, SIDE - x, SIDE - y))
        scenes.append(Scene(things, ground, f"a {colour} {word} {relation} a {its_colour} {other}"))
    return scenes


def examination(word: str) -> list[Scene]:
    """Scenes with the glyph `word` in the middle, on backgrounds that the lesson does not have."""
    return [_alone(word, colour, ground) for colour, ground in _EXAMINATION]


# colour, background, size, place
_ALONE = (
    ("red", "white", "", "in the middle"), ("blue", "yellow", "big", "in the middle"),
    ("green", "gray", "", "on the left"),
    ("yellow", "black", "", "on the right"), ("white", "green", "big", ""), ("black", "white", "", ""),
)  # fmt: skip
# (colour, background), (shape, colour), relation
_TOGETHER = (
    (("orange", "blue"), ("circle", "white"), "left of"),
    (("purple", "yellow"), ("square", "green"), "right of"),
)
# colour, background
_EXAMINATION = (
    ("white", "purple"), ("green", "pink"), ("blue", "orange"), ("yellow", "red"), ("black", "pink"),
    ("red", "orange"), ("pink", "purple"), ("white", "red"), ("yellow", "purple"), ("blue", "pink"),
)  # fmt: skip


def _alone(word: str, colour: str, ground: str, size: str = "", place: str = "") -> Scene:
    x, y = PLACES[place or "in the middle"]
    return Scene((Thing(word, colour, x, y, SIZES[size]),), ground, _words("a", size, colour, word, place))


def contact_sheet(pictures: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Pictures of one size side by side, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (255, 255, 255))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


def _single(rng: np.random.Generator) -> Scene:
    shape, (colour, ground) = _pick(rng, SHAPES), _distinct(rng, 2)
    size, place = _pick(rng, SIZES), _pick(rng, ("", *PLACES))
    x, y = PLACES[place or "in the middle"] + rng.uniform(-3, 3, 2)
    thing = Thing(shape, colour, x, y, SIZES[size] * rng.uniform(0.94, 1.06))
    return Scene((thing,), ground, _words("a", size, colour, shape, place))


def _several(rng: np.random.Generator) -> Scene:
    shape, (colour, ground), count = _pick(rng, SHAPES), _distinct(rng, 2), int(rng.integers(2, 4))
    xs = SIDE / 2 + (np.arange(count) - (count - 1) / 2) * (54 if count == 2 else 41)
    y, radius = SIDE / 2 + rng.uniform(-3, 3), 17 * rng.uniform(0.94, 1.06)
    things = tuple(Thing(shape, colour, x, y, radius) for x in xs + rng.uniform(-2, 2))
    return Scene(things, ground, _words(NUMBERS[count], colour, shape + ("es" if shape == "cross" else "s")))


def _pair(rng: np.random.Generator) -> Scene:
    shapes, (*colours, ground) = [_pick(rng, SHAPES) for _ in range(2)], _distinct(rng, 3)
    relation = _pick(rng, RELATIONS)
    dx, dy = RELATIONS[relation]
    sizes = [_pick(rng, ("small", "")) for _ in range(2)]
    things = tuple(
        Thing(
            shapes[i], colours[i],
            SIDE / 2 + side * _APART * dx + rng.uniform(-2, 2), SIDE / 2 + side * _APART * dy + rng.uniform(-2, 2),
            SIZES[sizes[i]] * rng.uniform(0.94, 1.06),
        )
        for i, side in enumerate((1, -1))
    )  # fmt: skip
    first, second = (_words("a", sizes[i], colours[i], shapes[i]) for i in range(2))
    return Scene(things, ground, f"{first} {relation} {second}")


def _pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    options = list(options)
    return options[rng.integers(len(options))]


def _distinct(rng: np.random.Generator, count: int) -> list[str]:
    return [str(name) for name in rng.permutation(list(COLOURS))[:count]]


def _words(*words: str) -> str:
    return " ".join(filter(None, words))


def _shade(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in np.clip(COLOURS[colour] + rng.integers(-_JITTER, _JITTER + 1, 3), 0, 255))
    return red, green, blue
