"""The recipe of the tiny model from end to end in miniature: networks that learn nothing in a few steps, every file."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import mlx.core as mx
from support.daily import daily
from support.networks import pipeline
from support.parity import assert_parity

import zimage_mlx.tiny.__main__ as command
import zimage_mlx.tiny.recipe as recipe
from zimage_cli.app import main
from zimage_cli.commands import demo
from zimage_mlx.networks.vae import VAE
from zimage_mlx.tiny.losses import Denoiser, denoising_loss, vae_loss
from zimage_mlx.tiny.stepper import Stepper
from zimage_ref import ConfigError, ModelFolder, ZImageError
from zimage_ref.checkpoints import hub
from zimage_ref.checkpoints.hub import TINY
from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import BFLOAT16
from zimage_ref.model.flow import is_turbo
from zimage_ref.tiny import drawings
from zimage_ref.tiny.data import TOKENS

MINIATURE = recipe.Networks(
    replace(recipe.NETWORKS.transformer, dim=48, n_layers=1, n_heads=2, axes_dims=(8, 8, 8), cap_feat_dim=32),
    replace(
        recipe.NETWORKS.text_encoder, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    ),
    replace(recipe.NETWORKS.vae, block_out_channels=(4, 4, 8, 8), norm_num_groups=4),
)  # fmt: skip
SHORT = recipe.Recipe(pictures=9, vae_steps=2, vae_batch=1, steps=2, batch=4)
OPTIONS = recipe.BuildOptions(every=2, judged=1)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A model of the whole recipe, and the lines of its progress."""
    folder, lines = tmp_path_factory.mktemp("tiny") / "model", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "WHOLE", 0.5)  # the second step of two
        assert recipe.build(folder, SHORT, replace(OPTIONS, report=lines.append), MINIATURE)
    return folder, lines


def test_the_recipe_writes_a_whole_model_in_bfloat16_and_a_card(made: tuple[Path, list[dict[str, Any]]]) -> None:
    folder = ModelFolder.open(made[0])
    assert {t.dtype for tensors in folder.weights.values() for t in tensors.values()} == {BFLOAT16}
    assert folder.transformer == MINIATURE.transformer and folder.text_encoder == MINIATURE.text_encoder
    assert folder.vae.scaling_factor != 1 and folder.vae.shift_factor != 0  # as the latents are
    assert "8 by text encoder and transformer" in (made[0] / "README.md").read_text(encoding="utf-8")


def test_the_model_is_a_base_model_at_the_shift_of_its_resolution(made: tuple[Path, list[dict[str, Any]]]) -> None:
    scheduler = ModelFolder.open(made[0]).scheduler
    assert scheduler.use_dynamic_shifting and not is_turbo(scheduler)


def test_progress_says_how_good_each_stage_is(made: tuple[Path, list[dict[str, Any]]]) -> None:
    lines = made[1]
    assert [(line["stage"], line.get("step")) for line in lines] == [
        ("drawings", None), ("autoencoder", 2), ("denoiser", 2), ("finished", None),
    ]  # fmt: skip
    autoencoder, denoiser = lines[1], lines[2]
    assert autoencoder["loss"] > 0 and autoencoder["psnr"] > 0 and 0 <= autoencoder["judged"] <= 1
    assert {"loss", "seconds", "judged at guidance 0", "judged at guidance 3"} <= denoiser.keys()
    assert json.loads(json.dumps(lines)) == lines


@pytest.mark.slow
def test_stopped_after_every_step_it_comes_to_the_same_bytes(
    made: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, stops, lines = Stepper.__call__, [False], []

    def one_step(self: Stepper, *args: Any) -> Any:
        stops[0] = True
        return plain(self, *args)

    monkeypatch.setattr(recipe, "WHOLE", 0.5)
    monkeypatch.setattr(Stepper, "__call__", one_step)
    monkeypatch.setattr(recipe.time, "monotonic", lambda: float(stops[0]))
    options = replace(OPTIONS, deadline=0.5, report=lines.append)
    runs = 0
    while True:
        stops[0] = False
        runs += 1
        if recipe.build(tmp_path / "model", SHORT, options, MINIATURE):
            break
    assert runs > 3 and any(line.get("stopped") for line in lines)
    assert files(tmp_path / "model") == files(made[0])


def test_a_state_of_another_recipe_or_of_mixed_steps_is_refused(
    made: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = made[0], made[0].with_name("model.training") / "denoiser"
    with pytest.raises(ConfigError, match="made with .*: delete"):
        recipe.build(model, replace(SHORT, rate=1.0), OPTIONS, MINIATURE)
    argv = ["tiny", f"--output={model}", "--pictures=9", "--batch=4"]  # the state of smaller networks
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="^error: .*weights.safetensors: made with"):
        command.main()
    tensors, metadata = safetensors.read(state / "m.safetensors")
    kept = (state / "m.safetensors").read_bytes()
    safetensors.write(state / "m.safetensors", tensors, metadata | {"step": "1"})
    with pytest.raises(ConfigError, match=r"of steps \[1, 2\]"):
        recipe.build(model, SHORT, OPTIONS, MINIATURE)
    (state / "m.safetensors").write_bytes(kept)


@pytest.mark.parametrize("other", [{"vae_rate": 1.0}, {"seed": 1}])
def test_an_autoencoder_of_another_rate_or_seed_is_not_gone_on_with(tmp_path: Path, other: dict[str, Any]) -> None:
    pictures, short = recipe.drawings(SHORT.pictures, SHORT.seed)[0], replace(SHORT, vae_steps=1)
    given = (MINIATURE.vae, OPTIONS, tmp_path / "autoencoder")
    assert recipe.train_vae(pictures, short, *given)
    with pytest.raises(ConfigError, match="made with .*: delete"):
        recipe.train_vae(pictures, replace(short, **other), *given)


def test_a_tokenizer_written_only_in_part_is_written_again(
    made: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shutil.copytree(made[0].parent, tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / "tokenizer" / name).unlink()
    assert recipe.build(tmp_path / "model", SHORT, OPTIONS, MINIATURE)
    assert files(tmp_path / "model") == files(made[0])


def test_both_engines_draw_the_same_with_it(made: tuple[Path, list[dict[str, Any]]]) -> None:
    caption = "a red circle on a blue background"
    options = {"width": 128, "height": 128, "steps": 2, "guidance": 3.0, "output": "array"}
    ours, theirs = (pipeline(backend, made[0])(caption, **options)[0] for backend in ("mlx", "numpy"))
    assert ours.std() > 0.01
    assert_parity(ours, theirs, "picture")


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_diffusers_opens_it_and_draws_the_same(made: tuple[Path, list[dict[str, Any]]]) -> None:
    official = pytest.importorskip("support.official", reason="torch and diffusers are not installed (extra `oracle`)")
    noise = np.random.default_rng(1).standard_normal((1, 16, 16, 16), np.float32)
    caption = "a red circle left of an orange star on a blue background"
    expected = official.generate(official.pipeline(made[0]), caption, noise, 8, "np", 3.0, "")
    actual = pipeline("numpy", made[0])(
        caption, width=128, height=128, steps=8, guidance=3.0, latents=noise, output="array"
    )[0]
    assert_parity(actual, expected, "official picture")


def test_the_demo_runs_from_end_to_end(
    made: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "PICTURES", 1)
    monkeypatch.setattr(demo, "STEPS", 1)
    assert main(["demo", f"--model-dir={made[0]}", f"--output={tmp_path / 'out'}"]) == 0
    with Image.open(tmp_path / "out" / "before-after.png") as sheet:
        assert sheet.size == (2 * 132 + 4, 2 * 132 + 4)
    assert (tmp_path / "out" / "zorp.safetensors").is_file() and len(list((tmp_path / "out").glob("dataset/*"))) == 16
    text = capsys.readouterr().out
    assert "zorp" in text and "loss" in text and "--dataset PICTURES" in text


@pytest.mark.parametrize("stage", daily(["autoencoder", "denoiser"], "denoiser"))
def test_steps_lower_the_loss_and_the_average_follows(stage: str) -> None:
    mx.random.seed(0)
    rng = np.random.default_rng(0)
    if stage == "autoencoder":
        model, loss = VAE(replace(MINIATURE.vae, block_out_channels=(4, 8))), vae_loss
        inputs = [mx.array(np.stack([np.asarray(drawings.draw(s, rng).resize((16, 16))) for s in drawings.take(4, 0)]))]
    else:
        model = Denoiser(MINIATURE.transformer, MINIATURE.text_encoder)
        layout = model.transformer.layout([TOKENS], 4, 4)
        mx.eval(layout.image_rotation, layout.caption_rotation, layout.rotation)

        def loss(model: Any, key: Any, *inputs: Any) -> Any:
            return denoising_loss(model, key, *inputs, layout)

        inputs = [
            mx.array(np.tile(rng.standard_normal((1, 16, 4, 4), np.float32), (4, 1, 1, 1))),
            mx.ones((4, TOKENS), mx.int32), mx.full((4,), 20),
        ]  # fmt: skip
    stepper = Stepper(model, loss, 1e-2, 14)
    start = stepper.vectors["weights"]
    losses = [stepper(mx.random.key(i), *inputs).item() for i in range(14)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    moved, followed = (float(mx.linalg.norm(stepper.vectors[n] - start)) for n in ("weights", "average"))
    assert 0 < followed < moved


def test_the_demo_says_before_it_draws_that_it_has_nowhere_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["demo", f"--output={tmp_path / 'file'}"]) == 1
    said = capsys.readouterr().err.replace("\n", "")
    assert "is a file, not a folder" in said and "denoise" not in said


def test_the_demo_trains_on_no_pictures_but_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dataset").mkdir()
    for name in (".DS_Store", "cat.png", "zorp1.jpg", "zorp1.txt"):
        (tmp_path / "dataset" / name).write_bytes(b"")
    assert main(["demo", f"--output={tmp_path}"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "holds cat.png, zorp1.jpg, not from this demo" in said and "denoise" not in said


def test_without_weights_in_the_package_the_name_tiny_says_how_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "BUILT_IN", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 1 and not list(tmp_path.iterdir())
    assert "python -m zimage_mlx.tiny --output DIR" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_called_tiny_comes_before_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZImageError, match="tiny: holds no"):
        ModelFolder.open(Path(TINY))
