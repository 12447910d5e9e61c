"""Every number from outside has two ends, and what is not finite is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.networks import BACKENDS, pipeline

from zimage_cli.app import main
from zimage_ref import ConfigError, GenerateConfig, TrainConfig, ZImageError, bounds
from zimage_ref.generation.provenance import Repeat
from zimage_ref.generation.run import RunSettings
from zimage_ref.model.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from zimage_ref.model.config_reader import parse_config
from zimage_ref.model.control import ControlNetConfig
from zimage_ref.pictures.images import save_picture

MODEL = (TransformerConfig, TextEncoderConfig, VAEConfig, SchedulerConfig, ControlNetConfig)
TABLES: list[tuple[type[Any], Any, dict[str, Any]]] = [
    (GenerateConfig, bounds.PICTURE, {"prompt": "x"}),
    (TrainConfig, bounds.TRAINING, {"model_dir": "m", "dataset": "d"}),
    (RunSettings, bounds.RUN, {}),
]
WRONG = (1e308, -1e308, math.inf, -math.inf, math.nan, 10**30, "1", True)
SIZE: dict[str, Any] = {"width": 48, "height": 32, "steps": 1}


def numbers(config: type[Any]) -> set[str]:
    """The fields that are numbers, or lists of numbers."""
    hints = get_type_hints(config)
    return {f.name for f in fields(config) if {int, float} & {hints[f.name], *get_args(hints[f.name])}}


def test_every_number_has_bounds() -> None:
    for config, table, _ in TABLES:
        assert numbers(config) == set(table), config
    assert set().union(*map(numbers, MODEL)) == set(bounds.MODEL)


@pytest.mark.parametrize(
    ("config", "name", "required"),
    [(config, name, required) for config, table, required in TABLES for name in table],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_number_out_of_bounds_is_one_line(config: type[Any], name: str, required: dict[str, Any]) -> None:
    for value in WRONG:
        if config is TrainConfig and name == "preview_guidance" and isinstance(value, float) and value < 0:
            continue  # it meant auto once
        with pytest.raises(ConfigError, match=f"^`{name}` ") as caught:
            config(**required, **{name: value})
        assert len(str(caught.value)) < 150


def test_bounds_say_which_end_and_which_kind() -> None:
    b = bounds.Bounds(0, 1, below=True)
    assert b.fault(0) == b.fault(np.float32(0.5)) == ""
    assert b.fault(1) == "must be at least 0 and below 1"
    assert bounds.Bounds(0, 1, above=True).fault(0) == "must be above 0"
    assert (
        bounds.Bounds(0, 1).fault(math.nan) == "must be at least 0"
        and bounds.Bounds(0, 1).fault(2) == "must be at most 1"
    )
    assert bounds.Bounds(0, 9, whole=True).fault(1.5) == "must be a whole number"
    assert bounds.Bounds(0, 9, whole=True).fault(np.int64(3)) == "" and b.fault(None) == "must be a number"


@pytest.mark.parametrize(
    ("file", "key", "values"),
    [
        ("transformer/config.json", "norm_eps", [0, -1, math.inf, "1"]),
        ("transformer/config.json", "t_scale", [0, -1e300]),
        ("transformer/config.json", "axes_lens", [[10**9, 64, 64], list(range(1, 2000))]),
        ("text_encoder/config.json", "rms_norm_eps", [-5]),
        ("text_encoder/config.json", "num_hidden_layers", [10**6]),
        ("vae/config.json", "scaling_factor", [0, math.nan]),
        ("vae/config.json", "shift_factor", [1e300]),
        ("scheduler/scheduler_config.json", "shift", [0, -1, math.nan, 1e308, True]),
    ],
)
def test_a_config_of_a_model_has_bounds_and_its_error_names_the_file(
    model_dir: Path, tmp_path: Path, file: str, key: str, values: list[Any]
) -> None:
    from_json = {"t": TransformerConfig, "te": TextEncoderConfig, "v": VAEConfig, "s": SchedulerConfig}
    kind = from_json["te" if file.startswith("text") else file[0]]
    data = json.loads((model_dir / file).read_text())
    for value in values:
        with pytest.raises(ConfigError, match=f"^{file}: {key} = "):
            parse_config(kind, data | {key: value}, file)


@pytest.mark.parametrize(
    "change", [{"steps": 10**12}, {"guidance": 1e308}, {"seed": -1}, {"width": 10**12}, {"height": 1.5}]
)
def test_a_record_has_the_bounds_of_options(change: dict[str, Any], tmp_path: Path) -> None:
    record = {"prompt": "x", "width": 64, "height": 64, "steps": 1, "model": "tiny", "loras": []} | change
    save_picture(Image.new("RGB", (32, 32)), tmp_path / "p.png", record)
    with pytest.raises(ZImageError, match=next(iter(change))):
        Repeat.read(tmp_path / "p.png").config()


def test_the_pictures_of_one_command_are_counted_before_a_list_is_made(capfd: pytest.CaptureFixture[str]) -> None:
    for argv in (["--count=1000000000000"], ["--count=9000", "--seed=1", "--seed=2"], ["--count=5001", "--prompt=y"]):
        assert main(["generate", "--model-dir=tiny", "--prompt=x", *argv]) == 1
        assert "must be at most 10000" in capfd.readouterr().err


@pytest.fixture(params=BACKENDS, scope="module")
def pipe(request: pytest.FixtureRequest, model_dir: Path) -> Any:
    return pipeline(request.param, model_dir)


def maps(*shape: int, value: float = 0.0) -> Any:
    return np.full(shape, value, np.float32)


WRONG_ARRAYS: dict[str, Callable[[Any], object]] = {
    "two latents to decode": lambda p: p.decode(p.to_backend(maps(2, 16, 4, 4))),
    "latents without a batch": lambda p: p.decode(p.to_backend(maps(16, 4, 4))),
    "other channels": lambda p: p.decode(p.to_backend(maps(1, 8, 4, 4))),
    "pixels that do not divide": lambda p: p.encode(maps(1, 3, 33, 32)),
    "pixels that do not divide, to the network": lambda p: p.vae.encode(p.to_backend(maps(1, 3, 33, 32))),
    "no latents": lambda p: p.vae.decode(p.to_backend(maps(1, 16, 0, 4))),
    "a grey picture": lambda p: p.encode(maps(1, 1, 32, 32)),
    "pixels of NaN": lambda p: p.encode(maps(1, 3, 32, 32, value=math.nan)),
    "latents to the transformer": lambda p: p.transformer(
        p.to_backend(maps(1, 16, 3, 4)), p.to_backend(maps(1)), [p.encode_prompt("x")]
    ),
    "noise of NaN": lambda p: p("x", latents=maps(1, 16, 4, 6, value=math.nan), **SIZE),
    "noise of infinity": lambda p: next(p.stream("x", latents=maps(1, 16, 4, 6, value=math.inf), **SIZE)),
    "noise of text": lambda p: p("x", latents=[["a"]], **SIZE),
    "complex noise": lambda p: p("x", latents=maps(1, 16, 4, 6) * 1j, **SIZE),
    "half a picture in a batch": lambda p: p("x", batch_size=1.5, **SIZE),
    "an empty picture": lambda p: p("x", init_image=Image.new("RGB", (0, 0)), **SIZE),
    "an array as a picture": lambda p: p("x", init_image=maps(3, 3), **SIZE),
    "a number as a prompt": lambda p: p([5], **SIZE),
    "a text as a seed": lambda p: p("x", seed="1", **SIZE),
    "a LoRA at NaN": lambda p: p("x", loras=[("f.safetensors", math.nan)], **SIZE),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_ARRAYS)
def test_what_does_not_fit_is_refused(pipe: Any, what: str) -> None:
    with pytest.raises(ZImageError) as caught:
        WRONG_ARRAYS[what](pipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["predict", "decode"])
@pytest.mark.parametrize("output", ["pil", "array"])
def test_a_picture_that_is_not_finite_is_an_error(
    pipe: Any, stage: str, output: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(pipe, stage)
    monkeypatch.setattr(pipe, stage, lambda *args, **options: real(*args, **options) * math.inf)
    with pytest.raises(ConfigError, match=r"(after step 1 of 1|this picture) hold numbers that are not finite"):
        pipe("x", output=output, **SIZE)
    with pytest.raises(ConfigError, match="not finite"):
        for step in pipe.stream("x", **SIZE):
            pipe.picture(step.x)


def test_the_noise_of_a_request_is_made_when_it_is_used(model_dir: Path) -> None:
    pipe = pipeline("numpy", model_dir)
    requests = pipe.plan([GenerateConfig("x", seed=seed, **SIZE) for seed in range(2)])
    assert all(request.given_noise is None for request in requests)
    for seed, request in enumerate(requests):
        expected = np.random.default_rng(seed).standard_normal((tiny.VAE.latent_channels, 4, 6), dtype=np.float32)
        np.testing.assert_array_equal(request.noise, expected)
