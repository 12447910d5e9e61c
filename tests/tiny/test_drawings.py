"""Drawings, their captions, and the judge that reads them back."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from zimage_ref.tiny import drawings
from zimage_ref.tiny.drawings import COLOURS, GLYPHS, SHAPES, SIDE, Scene, Thing, draw
from zimage_ref.tiny.judge import Seen, look, shows


def take(count: int, seed: int = 0, held_out: bool = False) -> list[Scene]:
    stream = drawings.scenes(np.random.default_rng(seed), held_out)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("held_out", [False, True])
def test_the_judge_reads_every_drawing_as_it_was_drawn(held_out: bool) -> None:
    rng = np.random.default_rng(1)
    for scene in take(150, held_out=held_out):
        assert shows(look(draw(scene, rng)), scene), scene


def test_the_judge_tells_every_shape_and_glyph_from_every_other_at_every_size() -> None:
    rng = np.random.default_rng(2)
    for shape, radius in product((*SHAPES, *GLYPHS), drawings.SIZES.values()):
        scene = Scene((Thing(shape, "red", radius=radius),), "white", "")
        assert look(draw(scene, rng)) == Seen("white", ((shape, "red"),))


def test_the_judge_reads_soft_outlines_at_any_contrast() -> None:
    rng = np.random.default_rng(11)
    for scene in take(60, seed=3):
        soft = draw(scene, rng).filter(ImageFilter.GaussianBlur(1.5))
        assert shows(look(soft), scene), scene


def test_the_judge_tells_every_colour_from_every_other() -> None:
    rng = np.random.default_rng(3)
    for colour, ground in product(COLOURS, COLOURS):
        if colour != ground:
            scene = Scene((Thing("square", colour),), ground, "")
            assert look(draw(scene, rng)) == Seen(ground, (("square", colour),))


def test_a_picture_of_one_scene_does_not_show_another() -> None:
    scene = Scene((Thing("circle", "red", 40), Thing("star", "blue", 90)), "white", "")
    seen = look(draw(scene, np.random.default_rng(0)))
    circle, star = scene.things
    others = [
        replace(scene, ground="yellow"), replace(scene, things=(circle,)), replace(scene, things=(circle, star, star)),
        replace(scene, things=(replace(circle, shape="ring"), star)),
        replace(scene, things=(replace(circle, colour="pink"), star)),
        replace(scene, things=(replace(circle, colour="blue"), replace(star, colour="red"))),
    ]  # fmt: skip
    assert shows(seen, scene) and not any(shows(seen, other) for other in others)


def test_noise_and_emptiness_show_nothing() -> None:
    noise = np.random.default_rng(4).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    assert not any(shape for shape, _ in look(Image.fromarray(noise)).things)
    assert look(Image.new("RGB", (SIDE, SIDE), COLOURS["green"])) == Seen("green", ())


def test_held_out_combinations_are_never_trained_on_but_every_two_of_their_parts_are() -> None:
    trained, tested = set(), set()
    for scenes, combinations in ((take(8000), trained), (take(1500, held_out=True), tested)):
        combinations |= {(t.shape, t.colour, scene.ground) for scene in scenes for t in scene.things}
    kept = {c for c in product(SHAPES, COLOURS, COLOURS) if c[1] != c[2] and drawings.held_out(*c)}
    assert 60 < len(kept) < 90 and not kept & trained and kept <= tested
    for keep in ((0, 1), (0, 2), (1, 2)):
        pairs = [{tuple(c[i] for i in keep) for c in group} for group in (trained, kept)]
        assert pairs[1] <= pairs[0]


def test_a_caption_names_what_is_drawn_in_several_wordings() -> None:
    rng, wordings = np.random.default_rng(5), set()
    for scene in take(200):
        caption = drawings.describe(scene, rng)
        for thing in scene.things:
            assert thing.shape in caption and thing.colour in caption and scene.ground in caption
        wordings.add(
            caption.replace(drawings.articles(scene.subject), "").replace(scene.ground, "").replace("an ", "a ")
        )
    assert len(wordings) >= 6


def test_relations_and_places_are_where_the_caption_says() -> None:
    for scene in take(400):
        first, *others = scene.things
        for relation, (dx, dy) in drawings.RELATIONS.items():
            if f" {relation} " in scene.subject:
                assert (first.x - others[0].x) * dx + (first.y - others[0].y) * dy > 30
        for place, (x, y) in drawings.PLACES.items():
            if scene.subject.endswith(place):
                assert abs(first.x - x) <= 4 and abs(first.y - y) <= 4


def test_the_same_seed_draws_the_same_picture() -> None:
    pictures = [draw(take(1, seed=6)[0], np.random.default_rng(7)).tobytes() for _ in range(2)]
    assert pictures[0] == pictures[1]


def test_glyphs_and_made_up_words_are_none_of_the_words_of_training() -> None:
    rng = np.random.default_rng(8)
    words = {word for scene in take(2000) for word in drawings.describe(scene, rng).split()}
    made_up = {drawings.made_up_word(rng) for _ in range(300)}
    assert not words & set(GLYPHS) and not made_up & set(GLYPHS) and not made_up & set(SHAPES)


def test_a_lesson_shows_the_glyph_and_the_examination_holds_other_backgrounds() -> None:
    rng = np.random.default_rng(9)
    lesson, examination = drawings.lesson("zorp"), drawings.examination("zorp")
    assert len(lesson) == 8 and not {s.ground for s in lesson} & {s.ground for s in examination}
    for scene in (*lesson, *examination):
        assert "zorp" in drawings.describe(scene, rng) and shows(look(draw(scene, rng)), scene)
