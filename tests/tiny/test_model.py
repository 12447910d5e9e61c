"""The built-in model: what it can do, alike on both engines, and what a LoRA can teach it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.networks import long_only
from support.parity import assert_parity

import zimage_ref
from zimage_ref import ModelFolder
from zimage_ref.checkpoints.hub import BUILT_IN, TINY
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.tensors import BFLOAT16
from zimage_ref.model.positions import SEQUENCE_MULTIPLE
from zimage_ref.model.tokenizer import Tokenizer
from zimage_ref.pictures.images import to_array
from zimage_ref.tiny import drawings
from zimage_ref.tiny.data import GUIDANCE, STEPS
from zimage_ref.tiny.judge import look, shows

SIDE = drawings.SIDE
LEARNED = 0.8  # of the pictures of a new word, from which on it has been learned
START = 0.28  # the loss on drawings of it, before anything is learned, is below this: 0.25
pytestmark = pytest.mark.skipif(
    not BUILT_IN.is_dir(),
    reason="the package holds no weights of the tiny model yet (python -m zimage_mlx.tiny makes them)",
)


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return ModelFolder.open(Path("tiny"))


@pytest.fixture(scope="module")
def reference(folder: ModelFolder) -> zimage_ref.ZImagePipeline:
    return zimage_ref.ZImagePipeline(folder)


def held_out(count: int) -> list[drawings.Scene]:
    return drawings.take(count, seed=77, held_out=True)


def test_the_folder_is_small_whole_and_in_bfloat16(folder: ModelFolder) -> None:
    sizes = {file: file.stat().st_size for file in folder.path.rglob("*")}
    control = sum(size for file, size in sizes.items() if file.parent.name == "controlnet")
    assert control < 1_550_000 and sum(sizes.values()) - control < 8_000_000
    assert {t.dtype for tensors in folder.weights.values() for t in tensors.values()} == {BFLOAT16}
    for part in ("README.md", "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        assert (folder.path / part).is_file()


def test_every_caption_fits_the_length_that_the_model_was_trained_at(folder: ModelFolder) -> None:
    tokenizer, rng = Tokenizer(folder.tokenizer), np.random.default_rng(1)
    for scene in held_out(300):
        assert tokenizer.count(drawings.describe(scene, rng)) <= SEQUENCE_MULTIPLE
    empty = tokenizer.count("")
    for word in (*drawings.SHAPES, *drawings.COLOURS):
        assert tokenizer.count(f"a {word}") == empty + 2  # whole words are tokens


def test_the_autoencoder_reproduces_drawings(reference: zimage_ref.ZImagePipeline) -> None:
    rng = np.random.default_rng(2)
    pixels = np.stack([to_array(drawings.draw(scene, rng)) for scene in held_out(3)])
    decoded = reference.vae.decode(reference.vae.encode(pixels)).clip(-1, 1)
    error = np.mean(((decoded - pixels) / 2) ** 2, axis=(1, 2, 3))
    assert np.mean(-10 * np.log10(error)) > 28


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_pictures_show_what_captions_never_seen_in_training_say(
    reference: zimage_ref.ZImagePipeline, guidance: float
) -> None:
    scenes, rng = held_out(12), np.random.default_rng(3)
    captions = [drawings.describe(scene, rng) for scene in scenes]
    pictures = reference(captions, width=SIDE, height=SIDE, steps=8, guidance=guidance, seed=5)
    right = [shows(look(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
    assert sum(right) >= 10, [c for c, yes in zip(captions, right, strict=True) if not yes]


def test_both_engines_draw_the_same(reference: zimage_ref.ZImagePipeline) -> None:
    mlx = pytest.importorskip("zimage_mlx.pipeline", reason="MLX is not installed", exc_type=ImportError)
    how = {"width": SIDE, "height": SIDE, "steps": 2, "guidance": GUIDANCE, "output": "array"}
    captions = ["a red circle left of an orange star on a blue background", "two green hearts on white"]
    expected = reference(captions, **how)
    actual = mlx.ZImagePipeline.from_pretrained(TINY)(captions, **how)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_parity(ours, theirs, "picture")


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "steps", "levels"), [("euler", 200, 8), ("dpm++2m", 100, 3)])
def test_samplers_agree_on_a_trained_model_when_steps_are_many(
    reference: zimage_ref.ZImagePipeline, sampler: str, steps: int, levels: float
) -> None:
    """In levels of 255; Euler, of first order, is further from Heun than what is of second order (13 at 100 steps)."""
    how = {"width": SIDE, "height": SIDE, "steps": steps, "guidance": 0.0, "output": "array", "seed": 3}
    caption = "a big blue star on a yellow background"
    heun, other = (reference(caption, sampler=name, **how)[0] for name in ("heun", sampler))
    assert 0 < 255 * np.abs(heun - other).max() < levels


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_diffusers_draws_the_same(reference: zimage_ref.ZImagePipeline) -> None:
    official = pytest.importorskip("support.official", reason="torch and diffusers are not installed (extra `oracle`)")
    pipe = official.pipeline(reference.folder.path)
    noise = np.random.default_rng(1).standard_normal((1, 16, 16, 16), np.float32)
    caption = "a small purple heart above a green ring on a white background"
    for guidance in (0.0, GUIDANCE):
        expected = official.generate(pipe, caption, noise, STEPS, "np", guidance, "")
        actual = reference(
            caption, width=SIDE, height=SIDE, steps=STEPS, guidance=guidance, latents=noise, output="array"
        )[0]
        assert_parity(actual, expected, "official picture")


def shares(
    reference: zimage_ref.ZImagePipeline, lora: Path | None, scale: float, *exams: list[drawings.Scene]
) -> list[float]:
    """The share of each exam's scenes whose pictures show them, with the LoRA at `scale`, if there is one."""
    demo = pytest.importorskip("zimage_cli.commands.demo")
    shown = []
    for scenes in exams:
        made = reference(
            [demo.prompt(s) for s in scenes], width=SIDE, height=SIDE, steps=STEPS, guidance=GUIDANCE,
            loras=[(lora, scale)] if lora else [],
        )  # fmt: skip
        shown.append(float(np.mean([shows(look(picture), scene) for picture, scene in zip(made, scenes, strict=True)])))
    return shown


def learn(folder: Path, by_demo: bool = True, **changes: Any) -> tuple[Path, float]:
    """A LoRA of the demo's eight drawings, in `folder`, and the mean loss of its first two epochs, when it does little.

    by_demo: trained as the demo does; else by the trainer's defaults.
    """
    demo = pytest.importorskip("zimage_cli.commands.demo")
    zimage_mlx = pytest.importorskip("zimage_mlx", reason="training needs MLX", exc_type=ImportError)
    pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)
    given = Path(TINY), demo.write_dataset(folder / "dataset"), folder / "zorp.safetensors"
    config = replace(demo.lesson_plan(*given) if by_demo else zimage_mlx.TrainConfig(*given), **changes)
    losses = [event.loss for event in zimage_mlx.train(config) if isinstance(event, zimage_mlx.Step)]
    return Path(config.output), float(np.mean(losses[:16]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "by_demo", [pytest.param(True, id="as in the demo"), pytest.param(False, id="by default", marks=long_only)]
)
def test_a_lora_learns_a_word_from_eight_drawings_and_leaves_the_others_alone(
    reference: zimage_ref.ZImagePipeline, tmp_path: Path, by_demo: bool
) -> None:
    new, known = drawings.examination("zorp"), held_out(24)
    lora, loss = learn(tmp_path, by_demo)
    new_before, known_before = shares(reference, lora, 0.0, new, known)
    new_after, known_after = shares(reference, lora, 1.0, new, known)
    assert new_before < 0.1 and new_after > LEARNED
    assert known_before > 0.9 and known_after > 0.8
    assert loss < START
    how = {"width": SIDE, "height": SIDE, "steps": STEPS, "output": "array"}
    without, at_scale_0 = (reference("a red star on white", loras=loras, **how)[0] for loras in ([], [(lora, 0.0)]))
    np.testing.assert_array_equal(without, at_scale_0)


MISTAKES: dict[str, tuple[str, str, Callable[..., Any]]] = {  # what, where, and how it is done instead
    "time runs with the noise": ("training.gradient", "model_time", lambda real, sigma: 1 - real(sigma)),
    "velocity towards the noise": ("training.loss", "training_target", lambda real, x_0, noise: -real(x_0, noise)),
    "zeros for padding": (
        "networks.transformer",
        "fill",
        lambda real, tokens, pad, length: real(tokens, 0 * pad, length),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_training_shows_in_the_loss_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """On random weights none of them would: this base knows what it is shown, and no longer recognises it."""
    where, name, instead = MISTAKES[mistake]
    module = pytest.importorskip(f"zimage_mlx.{where}", reason="training needs MLX", exc_type=ImportError)
    monkeypatch.setattr(module, name, partial(instead, getattr(module, name)))
    assert learn(tmp_path, epochs=2)[1] > START


def test_its_name_is_taken_wherever_a_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = pytest.importorskip("zimage_cli.app").main
    assert main(["inspect", "--input", TINY]) == 0
    output = tmp_path / "t.npz"
    assert main(["convert", "--model-type", "transformer", "--input", TINY, "--output", str(output)]) == 0
    assert Checkpoint.open(output).tensors.keys() == ModelFolder.open(Path(TINY)).weights["transformer"].keys()
    asked = ["--prompt", "a red ring on white", "--width=128", "--height=128", "--steps=1"]
    assert main(["generate", "--model-dir", TINY, *asked, "--backend=numpy", f"--output={tmp_path / 'x.png'}"]) == 0
    assert zimage_ref.ZImagePipeline.from_pretrained(TINY).folder.path == ModelFolder.open(Path(TINY)).path
