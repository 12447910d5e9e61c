"""A harder word than the demo's: a block letter of five strokes. Its captions name no place and no size.

The preset for it was chosen by other letters than A and 6; see `docs/training.md`. To measure one, change LETTER.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.networks import long_only

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

from zimage_cli.commands import demo
from zimage_mlx import Done, TrainConfig, ZImagePipeline, train
from zimage_ref.checkpoints.hub import TINY
from zimage_ref.formats.tensors import Array
from zimage_ref.pictures.images import Picture, save_picture
from zimage_ref.tiny import drawings, judge
from zimage_ref.tiny.data import GUIDANCE, STEPS
from zimage_ref.tiny.drawings import SIDE, SIZES, Scene, Thing, examination, illustrated, take
from zimage_ref.training.presets import PRESETS

pytestmark = pytest.mark.slow
WORD, CLASS, LETTER = "dax", "star", "S"
RATE = 8e-4  # that of the preset is for Z-Image; the built-in model is narrower
_THICK = 0.36  # of a stroke; a letter reaches from -1 to 1
_EDGE = 0.85
_OPEN, _HALF = _EDGE - _THICK, _THICK / 2  # the inner end of a stroke at the side, and half a stroke in the middle
LETTERS = {
    "S": [[
        (-_EDGE, -1), (_EDGE, -1), (_EDGE, -1 + _THICK), (-_OPEN, -1 + _THICK), (-_OPEN, -_HALF), (_EDGE, -_HALF),
        (_EDGE, 1), (-_EDGE, 1), (-_EDGE, 1 - _THICK), (_OPEN, 1 - _THICK), (_OPEN, _HALF), (-_EDGE, _HALF),
    ]],
    "G": [[
        (-_EDGE, -1), (_EDGE, -1), (_EDGE, -1 + _THICK), (-_OPEN, -1 + _THICK), (-_OPEN, 1 - _THICK),
        (_OPEN, 1 - _THICK), (_OPEN, 0.35), (0, 0.35), (0, 0.35 - _THICK), (_EDGE, 0.35 - _THICK),
        (_EDGE, 1), (-_EDGE, 1),
    ]],
    "B": [
        [(-_EDGE, -1), (_EDGE, -1), (_EDGE, 1), (-_EDGE, 1)],
        [(-_OPEN, -1 + _THICK), (_OPEN, -1 + _THICK), (_OPEN, -_HALF), (-_OPEN, -_HALF)],
        [(-_OPEN, _HALF), (_OPEN, _HALF), (_OPEN, 1 - _THICK), (-_OPEN, 1 - _THICK)],
    ],
    "A": [
        [
            (-_EDGE, -1), (_EDGE, -1), (_EDGE, 1), (_OPEN, 1), (_OPEN, _HALF), (-_OPEN, _HALF), (-_OPEN, 1),
            (-_EDGE, 1),
        ],
        [(-_OPEN, -1 + _THICK), (_OPEN, -1 + _THICK), (_OPEN, -_HALF), (-_OPEN, -_HALF)],
    ],
    "6": [
        [
            (-_EDGE, -1), (_EDGE, -1), (_EDGE, -1 + _THICK), (-_OPEN, -1 + _THICK), (-_OPEN, -_HALF), (_EDGE, -_HALF),
            (_EDGE, 1), (-_EDGE, 1),
        ],
        [(-_OPEN, _HALF), (_OPEN, _HALF), (_OPEN, 1 - _THICK), (-_OPEN, 1 - _THICK)],
    ],
}  # fmt: skip
PAIRS = (
    ("red", "white"), ("blue", "yellow"), ("green", "gray"), ("yellow", "black"),
    ("white", "green"), ("black", "white"), ("orange", "blue"), ("purple", "yellow"),
)  # fmt: skip
PLACES = ((64, 64), (64, 64), (64, 48), (64, 80))  # of drawing i: the one of i modulo 4
BIG = (1, 4, 7)  # the numbers of larger drawings


def lesson(folder: Path) -> Path:
    """Eight drawings of the word. Their captions name colours, but neither place nor size."""
    rng = np.random.default_rng(0)
    for i, (ink, ground) in enumerate(PAIRS):
        x, y = PLACES[i % 4]
        thing = Thing(WORD, ink, x, y, SIZES["big" if i in BIG else ""])
        scene = Scene((thing,), ground, f"a {ink} {WORD}")
        save_picture(drawings.draw(scene, rng), folder / f"z{i}.png")
        (folder / f"z{i}.txt").write_text(drawings.describe(scene, rng), encoding="utf-8")
    return folder


def template() -> Array:
    return judge._cut(judge._mask_of(Thing(WORD, "black", radius=40)))


def overlap(picture: Picture) -> float:
    """Intersection over union of the largest patch of a picture and the letter, both cut out. 0 without a patch."""
    _, patches = judge._seen_patches(picture, judge.CONTRAST, judge.SMALLEST)
    if not patches:
        return 0.0
    cut, letter = judge._cut(max((inside for inside, _ in patches), key=lambda inside: int(inside.sum()))), template()
    return float((cut & letter).sum() / (cut | letter).sum())


def drawn(scenes: Sequence[Scene], lora: Path) -> list[Picture]:
    pipeline = ZImagePipeline.from_pretrained(TINY)
    prompts = [demo.prompt(scene) for scene in scenes]
    return pipeline(prompts, width=SIDE, height=SIDE, steps=STEPS, guidance=GUIDANCE, loras=[(lora, 1.0)])


@pytest.fixture
def letter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The letter is a shape that can be drawn, and that the judge knows."""
    monkeypatch.setitem(drawings.OUTLINES, WORD, [np.array(outline) for outline in LETTERS[LETTER]])
    judge._known_masks.cache_clear()
    yield
    judge._known_masks.cache_clear()


@long_only
@pytest.mark.usefixtures("letter")
def test_the_preset_for_a_shape_learns_a_letter_and_keeps_the_known_words(tmp_path: Path) -> None:
    """Measured were 0.85 and 56 of 60. In as much time the defaults give 0.63 and 50, and the model alone draws 59."""
    data, output = lesson(tmp_path / "dataset"), tmp_path / f"{WORD}.safetensors"
    prompts = [caption for _, caption in illustrated(take(100, seed=5), seed=5)]  # none of them is asked for below
    options: dict[str, Any] = {
        **PRESETS["logo"], "resolution": (SIDE,), "lr": RATE, "trigger": WORD, "preserve": CLASS,
        "preserve_prompt": prompts,
    }  # fmt: skip
    assert any(isinstance(event, Done) for event in train(TrainConfig(Path(TINY), data, output, **options)))
    letters = drawn([*examination(WORD), *examination(WORD)], output)
    assert np.mean([overlap(picture) for picture in letters]) >= 0.8
    known = take(60, seed=77, held_out=True)
    shown = [judge.shows(judge.look(p), s) for p, s in zip(drawn(known, output), known, strict=True)]
    assert sum(shown) >= 55  # one fewer than was measured: another BLAS may change a picture
