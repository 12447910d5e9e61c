"""Prompt to picture with both packages: official numbers, batches, seeds, guidance, layouts, LoRAs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import cases, tiny
from support.cases import NEGATIVE, PICTURES, PROMPT, STEPS, random_lora
from support.networks import BACKENDS, mlx_only, pipeline
from support.parity import assert_parity

from zimage_ref.errors import ConfigError, WeightError
from zimage_ref.formats import npz, safetensors
from zimage_ref.formats.tensors import Tensor
from zimage_ref.lora.file import write_lora

SIZE: dict[str, Any] = {"width": 48, "height": 32, "steps": 3}  # 6 image tokens, padded to 32
PROMPTS = ["waves", "a picture of soft waves and a red fox in the snow, " * 3, "fox"]  # padded to 32, 64 and 32
GOLDEN = cases.read("pipeline")

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def generate(pipe: Any, name: str, output: str) -> Any:
    """The golden picture `name`."""
    options = {"guidance": PICTURES[name], "negative_prompt": NEGATIVE, "latents": GOLDEN["noise"]}
    return pipe(PROMPT, width=48, height=32, steps=STEPS, output=output, **options)[0]


def test_prompts_have_the_tokens_that_the_golden_file_was_made_with(pipe: Any) -> None:
    assert pipe.tokenizer.encode(PROMPT).tolist() == GOLDEN["ids"].tolist()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", PICTURES)
def test_numpy_makes_the_official_latents_and_picture(model_dir: Path, name: str, dtype: str) -> None:
    pipe = pipeline("numpy", model_dir, dtype)
    assert_parity(generate(pipe, name, "latents"), GOLDEN[f"{name}.latent"], "golden")
    assert_parity(generate(pipe, name, "array"), GOLDEN[f"{name}.np"], "official picture")


@mlx_only
@pytest.mark.parametrize("name", PICTURES)
def test_mlx_and_numpy_make_the_same_latents_and_picture(model_dir: Path, name: str) -> None:
    mlx, numpy = pipeline("mlx", model_dir), pipeline("numpy", model_dir)
    assert_parity(generate(mlx, name, "latents"), generate(numpy, name, "latents"), "twin")
    assert_parity(generate(mlx, name, "array"), generate(numpy, name, "array"), "picture")
    assert_parity(generate(mlx, name, "array"), GOLDEN[f"{name}.np"], "official picture")


@mlx_only
def test_bfloat16_networks_make_nearly_the_same_latents(model_dir: Path) -> None:
    expected = generate(pipeline("numpy", model_dir, "float64"), "plain", "latents")
    actual = generate(pipeline("mlx", model_dir, "bfloat16"), "plain", "latents")
    assert_parity(actual, expected, "bfloat16 sampling")


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_batch_of_prompts_of_different_lengths_equals_single_pictures(pipe: Any, guidance: float) -> None:
    options = SIZE | {"guidance": guidance, "negative_prompt": NEGATIVE, "output": "latents"}
    together = pipe(PROMPTS, seed=5, **options)
    assert len(together) == 3
    for i, prompt in enumerate(PROMPTS):
        assert_parity(together[i], pipe(prompt, seed=5 + i, **options)[0], "same", name=prompt)


def test_zero_is_a_seed_and_seeds_decide_the_picture(pipe: Any) -> None:
    zero, again, other = (pipe(PROMPT, seed=seed, output="array", **SIZE)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(zero, again)
    assert np.abs(zero - other).max() > 0.1
    noise = np.random.default_rng(1).standard_normal((1, 16, 4, 6), dtype=np.float32)
    np.testing.assert_array_equal(pipe(PROMPT, seed=0, latents=noise, output="array", **SIZE)[0], other)


def test_the_negative_prompt_counts_with_guidance_only(pipe: Any) -> None:
    def make(guidance: float, negative: str) -> Any:
        return pipe(PROMPT, guidance=guidance, negative_prompt=negative, output="latents", **SIZE)[0]

    np.testing.assert_array_equal(make(0.0, ""), make(0.0, NEGATIVE))
    assert np.abs(make(2.0, "") - make(0.0, "")).max() > 0.01
    assert np.abs(make(2.0, "") - make(2.0, NEGATIVE)).max() > 0.001


def test_the_prompt_decides_the_picture(pipe: Any) -> None:
    first, second = (pipe(prompt, output="latents", **SIZE)[0] for prompt in ("waves", "fox"))
    assert np.abs(first - second).max() > 0.001


def test_the_three_outputs_show_the_same_picture(pipe: Any) -> None:
    (picture,), (pixels,), (latents,) = (pipe(PROMPT, output=output, **SIZE) for output in ("pil", "array", "latents"))
    assert isinstance(picture, Image.Image) and picture.size == (48, 32) and picture.mode == "RGB"
    assert pixels.shape == (32, 48, 3) and pixels.dtype == np.float32 and pixels.min() >= 0 and pixels.max() <= 1
    assert np.abs(np.asarray(picture) / 255.0 - pixels).max() <= 0.5 / 255 + 1e-6
    assert latents.shape == (16, 4, 6) and latents.dtype == np.float32
    assert pixels.std() > 0.05  # a picture, not a grey field


def test_progress_counts_every_unit_of_every_stage(pipe: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    pipe(PROMPTS[:2], guidance=1.0, progress=lambda *event: seen.append(event), **SIZE)
    stages = {"encode": 3, "denoise": 3, "decode": 2}  # two prompts and the negative one
    assert seen == [(stage, i + 1, total) for stage, total in stages.items() for i in range(total)]


def test_a_lora_file_changes_the_picture_and_leaves_again(pipe: Any, tmp_path: Path) -> None:
    write_lora(tmp_path / "fox.safetensors", random_lora(rank=4, seed=0), {"rank": 4})
    plain = pipe(PROMPT, output="latents", **SIZE)[0]
    full, half, none = (
        pipe(PROMPT, output="latents", loras=[(tmp_path / "fox.safetensors", scale)], **SIZE)[0]
        for scale in (1, 0.5, 0)
    )
    assert np.abs(full - plain).max() > 0.05 and np.abs(full - half).max() > 0.05
    np.testing.assert_array_equal(none, plain)
    np.testing.assert_array_equal(pipe(PROMPT, output="latents", **SIZE)[0], plain)


@mlx_only
def test_mlx_and_numpy_make_the_same_picture_with_two_loras(model_dir: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        write_lora(tmp_path / f"{seed}.safetensors", random_lora(rank=3 + seed, seed=seed), {})
    loras = [(tmp_path / "1.safetensors", 0.8), (tmp_path / "2.safetensors", -0.4)]
    mlx, numpy = (
        pipeline(backend, model_dir)(PROMPT, loras=loras, guidance=1.5, output="array", **SIZE)[0]
        for backend in ("mlx", "numpy")
    )
    assert_parity(mlx, numpy, "picture")


@every_backend
@pytest.mark.parametrize("layout", ["npz", "safetensors"])
def test_the_flat_layout_makes_the_same_picture(backend: str, layout: str, model_dir: Path, tmp_path: Path) -> None:
    flatten(model_dir, tmp_path, layout)
    expected = pipeline(backend, model_dir)(PROMPT, output="array", **SIZE)[0]
    np.testing.assert_array_equal(pipeline(backend, tmp_path)(PROMPT, output="array", **SIZE)[0], expected)


@every_backend
def test_lean_runs_make_the_same_picture(backend: str, model_dir: Path) -> None:
    expected = pipeline(backend, model_dir)(PROMPT, output="array", **SIZE)[0]
    lean = pipeline(backend, model_dir, lean=True)
    for _ in range(2):  # the second time everything is loaded anew
        np.testing.assert_array_equal(lean(PROMPT, output="array", **SIZE)[0], expected)
    if backend == "mlx":
        assert not lean.loaded


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"width": 40}, "40 must be a multiple of 16: "),
        ({"steps": 0}, "`steps` 0"),
        ({"guidance": -1.0}, "guidance"),
        ({"output": "jpeg"}, "output 'jpeg' must be one of pil, array, latents"),
        (
            {"latents": np.zeros((1, 16, 6, 4))},
            r"latents have shape \(1, 16, 6, 4\), the request needs \(1, 16, 4, 6\)",
        ),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_in_one_line(pipe: Any, options: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact) as caught:
        pipe(PROMPT, **(SIZE | options))
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="dtype 'int8' must be one of float32"):
        type(pipe)(pipe.folder, "int8")


@every_backend
def test_a_model_with_a_tensor_too_few_is_refused_when_it_is_opened(
    backend: str, model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    file = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors, _ = safetensors.read(model_dir / "vae" / file.name)
    safetensors.write(file, {k: v for k, v in tensors.items() if k != "encoder.conv_in.bias"})
    with pytest.raises(WeightError, match=r"1 missing: encoder\.conv_in\.bias"):
        pipeline(backend, tmp_path / "model")


def flatten(model: Path, folder: Path, layout: str) -> None:
    """The files of the original tool's folder: npz with a record, or safetensors beside the official configs."""
    stems = {"transformer": "z_image_turbo_bf16", "text_encoder": "qwen3_4b_text_encoder", "vae": "ae"}
    for component, stem in stems.items():
        (file,) = (model / component).glob("*.safetensors")
        tensors: dict[str, Tensor] = safetensors.read(file)[0]
        config = (model / component / "config.json").read_text(encoding="utf-8")
        if layout == "npz":
            npz.write(folder / f"{stem}.npz", tensors, {"config": json.loads(config)})
        else:
            safetensors.write(folder / f"{stem}.safetensors", tensors)
            (folder / component).mkdir()
            (folder / component / "config.json").write_text(config, encoding="utf-8")
    name = "qwen3-tokenizer.json" if layout == "npz" else "tokenizer.json"
    shutil.copy(model / "tokenizer" / "tokenizer.json", folder / name)


def test_the_scheduler_of_the_folder_is_used(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    config = tiny.SchedulerConfig(shift=6.0).to_json()
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    three, six = (pipeline("numpy", f)(PROMPT, output="latents", **SIZE)[0] for f in (model_dir, tmp_path / "model"))
    assert np.abs(three - six).max() > 0.01
