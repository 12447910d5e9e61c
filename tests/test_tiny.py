"""The built-in model: what it can do, alike on both engines, and what a LoRA can teach it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import zimage_ref
from zimage_ref import ModelFolder, drawings
from zimage_ref.hub import TINY
from zimage_ref.images import to_array
from zimage_ref.judge import look, shows
from zimage_ref.positions import SEQUENCE_MULTIPLE
from zimage_ref.tensors import BFLOAT16
from zimage_ref.tiny_data import GUIDANCE, STEPS
from zimage_ref.tokenizer import Tokenizer

SIDE = drawings.SIDE
pytestmark = pytest.mark.skipif(
    not Path(zimage_ref.__file__).with_name(TINY).is_dir(),
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
    assert sum(file.stat().st_size for file in folder.path.rglob("*")) < 8_000_000
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
    pixels = np.stack([to_array(drawings.draw(scene, rng)) for scene in held_out(6)])
    decoded = reference.vae.decode(reference.vae.encode(pixels)).clip(-1, 1)
    error = np.mean(((decoded - pixels) / 2) ** 2, axis=(1, 2, 3))
    assert np.mean(-10 * np.log10(error)) > 28


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_pictures_show_what_captions_never_seen_in_training_say(
    reference: zimage_ref.ZImagePipeline, guidance: float
) -> None:
    scenes, rng = held_out(12), np.random.default_rng(3)
    captions = [drawings.describe(scene, rng) for scene in scenes]
    pictures = reference(captions, width=SIDE, height=SIDE, steps=8, guidance=guidance, seed=5)
    right = [shows(look(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
    assert sum(right) >= 10, [c for c, yes in zip(captions, right, strict=True) if not yes]


@pytest.mark.slow
def test_a_lora_learns_a_word_from_eight_drawings_and_leaves_the_others_alone(
    reference: zimage_ref.ZImagePipeline, tmp_path: Path
) -> None:
    demo = pytest.importorskip("zimage_cli.demo")
    zimage_mlx = pytest.importorskip("zimage_mlx", reason="training needs MLX", exc_type=ImportError)
    config = zimage_mlx.TrainConfig(
        Path("tiny"), demo.write_dataset(tmp_path / "dataset"), tmp_path / "zorp.safetensors",
        epochs=demo.EPOCHS, lr=demo.RATE, resolution=(SIDE,),
    )  # fmt: skip
    assert list(zimage_mlx.train(config))

    def shown(scenes: list[drawings.Scene], scale: float) -> float:
        """The share of scenes whose pictures show them, with the LoRA at `scale`."""
        made = reference(
            [demo.prompt(s) for s in scenes], width=SIDE, height=SIDE, steps=STEPS, guidance=GUIDANCE,
            loras=[(config.output, scale)],
        )  # fmt: skip
        return float(np.mean([shows(look(picture), scene) for picture, scene in zip(made, scenes, strict=True)]))

    new, known = drawings.examination(demo.WORD), held_out(12)
    assert shown(new, 0.0) < 0.1 and shown(new, 1.0) > 0.8
    assert shown(known, 1.0) > shown(known, 0.0) - 0.2
