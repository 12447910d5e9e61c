"""Previews: from a quarter of the latents, at the size of the picture, shown under the progress bar."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
from PIL import Image
from support import tiny
from support.networks import BACKENDS, mlx_only, pipeline
from support.parity import assert_parity

from zimage_cli.app import main
from zimage_cli.terminal.console import Console, half_block_line
from zimage_ref import ConfigError, GenerateConfig, WeightError
from zimage_ref.checkpoints.tiny_decoder import read_tiny_decoder
from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import Tensor
from zimage_ref.generation.previews import averaged, quick_picture
from zimage_ref.generation.run import GenerationRun, RunSettings
from zimage_ref.model.tiny_decoder import tiny_decoder_parameters
from zimage_ref.pictures.images import half_blocks


def test_latents_are_averaged_two_by_two_and_an_odd_edge_is_repeated() -> None:
    x = np.arange(15, dtype=np.float32).reshape(1, 1, 3, 5)
    np.testing.assert_array_equal(averaged(x)[0, 0], [[3, 5, 6.5], [10.5, 12.5, 14]])
    assert averaged(np.zeros((1, 16, 6, 4), np.float32)).shape == (1, 16, 3, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_preview_decodes_a_quarter_and_has_the_size_of_the_picture(
    backend: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(backend, model_dir)
    shapes, decode = [], pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda x, tiles=None: shapes.append(tuple(x.shape[2:])) or decode(x, tiles))
    run = GenerationRun(pipe, RunSettings(preview_steps=1))
    seen: list[Image.Image] = []
    config = GenerateConfig("x", width=64, height=48, steps=3)
    (made,) = run.make(run.plan([config]), preview=lambda index, picture: seen.append(picture))
    assert shapes == [(3, 4), (3, 4), (6, 8)] and {picture.size for picture in seen} == {(64, 48)}
    latents = pipe.to_backend(np.random.default_rng(0).standard_normal((1, 16, 6, 8)).astype(np.float32))
    quick = np.asarray(quick_picture(pipe, latents), int)
    numpy = pipeline("numpy", model_dir)
    same = quick_picture(numpy, np.asarray(latents))
    assert np.abs(quick - np.asarray(same, int)).max() <= 1


def test_the_picture_grows_under_the_bar_and_goes() -> None:
    file = io.StringIO()
    console = Console(err=rich.console.Console(file=file, force_terminal=True, color_system="truecolor", width=80))
    red = [half_block_line(line) for line in half_blocks(Image.new("RGB", (8, 8), "red"), 8)]
    with console.progress() as bars:
        bars.update("denoise", 1, 2)
        before = file.tell()
        bars.picture(red)
        shown = file.getvalue()[before:]
        before = file.tell()
        bars.picture([])
        bars.update("denoise", 2, 2)
    assert shown.count("\u2580") == 32 and shown.index("denoise") < shown.index("\u2580")
    assert "\u2580" not in file.getvalue()[before:]


def decoder_weights(latents: int = 16, width: int = 12) -> dict[str, np.ndarray]:
    """Random ones, by the names of diffusers without `decoder.`."""
    return tiny.random_weights(tiny_decoder_parameters(latents, width), salt="taef1 ")


def named_by_its_author(arrays: dict[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """The same under the names of the single file: its first layer, which limits the latents, has the number 0."""
    parts = ((name.split(".", 2), array) for name, array in arrays.items())
    return {f"{prefix}{int(number) + 1}.{rest}": array for (_, number, rest), array in parts}


def decoder_file(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    safetensors.write(path, {name: Tensor.of(array) for name, array in arrays.items()})
    return path


@pytest.fixture(scope="module")
def taef1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = {f"decoder.{name}": array for name, array in decoder_weights().items()}
    named["encoder.layers.0.weight"] = np.zeros((12, 3, 3, 3), np.float32)  # a whole file has the encoder, too
    return decoder_file(tmp_path_factory.mktemp("taef1") / "taef1.safetensors", named)


LATENTS = np.random.default_rng(1).standard_normal((1, 16, 3, 5)).astype(np.float32) * 3


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor.of(array) for name, array in arrays.items()}


@mlx_only
def test_both_engines_decode_alike_with_taef1(model_dir: Path) -> None:
    made = {}
    for backend in ("numpy", "mlx"):
        pipe = pipeline(backend, model_dir)
        made[backend] = pipe.tiny_decoder(tensors(decoder_weights()))(pipe.to_backend(LATENTS))
    assert made["numpy"].shape == (3, 24, 40)
    assert_parity(made["mlx"], made["numpy"], "same")


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", BACKENDS)
def test_taef1_is_that_of_diffusers(backend: str, model_dir: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra `oracle`)")
    import torch
    from diffusers import AutoencoderTiny

    widths = (12,) * 4
    model = AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=widths, decoder_block_out_channels=widths
    ).double()
    state = {name: torch.from_numpy(np.asarray(a, np.float64)) for name, a in decoder_weights().items()}
    model.decoder.load_state_dict(state)  # strict: these are all its names
    with torch.no_grad():
        expected = model.decode(torch.from_numpy(LATENTS).double()).sample[0].numpy()
    pipe = pipeline(backend, model_dir)
    assert_parity(pipe.tiny_decoder(tensors(decoder_weights()))(pipe.to_backend(LATENTS)), expected, "golden")


@pytest.mark.parametrize("prefix", ["", "decoder.", "taesd_decoder."])
def test_the_names_of_its_author_are_read(prefix: str, model_dir: Path, taef1: Path, tmp_path: Path) -> None:
    folder = pipeline("numpy", model_dir).folder
    file = decoder_file(tmp_path / "one.safetensors", named_by_its_author(decoder_weights(), prefix))
    mine, theirs = read_tiny_decoder(file, folder), read_tiny_decoder(taef1, folder)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name].read())


def test_a_wrong_decoder_is_refused_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    pipe = pipeline("numpy", model_dir)
    sd = decoder_file(tmp_path / "taesd.safetensors", named_by_its_author(decoder_weights(latents=4)))
    short = decoder_file(tmp_path / "short.safetensors", dict(list(named_by_its_author(decoder_weights()).items())[:9]))
    for file, fact in ((sd, "decodes 4 latent channels, and this model has 16"), (short, "holds no decoder of TAEF1")):
        with pytest.raises(WeightError, match=fact):
            GenerationRun(pipe, RunSettings(preview_steps=1, preview_decoder=file)).plan([GenerateConfig("x")])
    with pytest.raises(ConfigError, match="`preview_decoder` needs `preview_steps`"):
        RunSettings(preview_decoder=sd)


def test_the_command_line_previews_with_taef1_and_the_picture_stays(
    taef1: Path, model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    common = ["generate", f"--model-dir={model_dir}", "--backend=numpy", "--prompt=x", "--size=32", "--steps=2"]
    made = {}
    for name, options in (("plain", []), ("taef1", [f"--preview-decoder={taef1}"])):
        path = tmp_path / f"{name}.png"
        assert main([*common, "--preview-steps=1", *options, f"--output={path}"]) == 0
        made[name] = path.read_bytes(), np.asarray(Image.open(tmp_path / f"{name}.preview.png"), int)
    assert made["plain"][0] == made["taef1"][0]
    assert np.abs(made["plain"][1] - made["taef1"][1]).max() > 9
    assert main([*common, f"--preview-decoder={taef1}", f"--output={tmp_path / 'x.png'}"]) == 1
    assert "--preview-decoder needs --preview-steps" in " ".join(capsys.readouterr().err.split())


def test_the_memory_estimate_counts_the_decoder(taef1: Path, model_dir: Path) -> None:
    pipe = pipeline("numpy", model_dir)

    def denoising(**settings: Any) -> int:
        run = GenerationRun(pipe, RunSettings(preview_steps=1, **settings))
        stages = run._memory(run.plan([GenerateConfig("x", width=64, height=48)]), "fast")
        return int(next(stage.activations for stage in stages if stage.name == "denoise"))

    assert denoising(preview_decoder=taef1) - denoising() == 64 * 48 * 64 * 4 * 4
