"""Bad values of the options that steer a picture: one line that names the option, in Python and in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zimage_cli.app import main
from zimage_ref import ConfigError, GenerateConfig, ZImageError
from zimage_ref.generation.run import GenerationRun, RunSettings

NAN, HUGE = float("nan"), 1e9
# Options that the bad one needs, and bad values of it
BAD: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "nag": ({"negative_prompt": "red", "guidance": 0.0}, (0.5, -1.0, NAN, HUGE, "strong")),
    "variety": ({}, (-0.1, 1.5, NAN, HUGE, "much")),
    "variety_until": ({"variety": 0.5}, (0.0, -1.0, 2.0, NAN, "late")),
    "cache": ({}, ("", "teacache", "taylor:0", "first-block:-1", "mag:0,1", "taylor:1.5", "first-block:nan")),
    "cache_min_steps": ({"cache": "taylor"}, (0, -1, 1.5, 100_000, "few")),
    "region": ({}, (("",), ("a fox",), ("0,0,2,1: x",), ("0,0,0,1: x",), ("nan,0,1,1: x",), ("0,0,0.5,1:",))),
    "upscale": ({}, (1.0, 0.0, 9.0, NAN, "large")),
    "upscale_strength": ({"upscale": 2.0}, (0.0, -1.0, 2.0, NAN, "much")),
    "sampler": ({}, ("", "ddim", "EULER", "res", "heun2")),
    "spacing": ({}, ("", "cosine", "KARRAS", "normal", "sgm")),
    "seed": ({}, (-1, 1.5, 2**64, HUGE, "rnd")),
    "size": ({}, ("", "10x", "3:0", "x", "1024x768x3")),
}
SIZE = {"width": 64, "height": 64, "steps": 1}


@pytest.mark.parametrize("name", BAD)
def test_python_refuses_each_in_one_line(name: str, pipe: Any) -> None:
    needed, values = BAD[name]
    for value in values:
        sides = {} if name == "size" else SIZE
        with pytest.raises(ConfigError) as caught:
            pipe("x", **sides, **needed, **{name: value})
        assert f"`{name}`" in str(caught.value) and "\n" not in str(caught.value), (value, caught.value)


def test_python_refuses_settings_of_a_run_in_one_line(pipe: Any, tmp_path: Path) -> None:
    text = tmp_path / "a.safetensors"
    text.write_text("no weights")
    for settings, kind in (
        ({"preview_steps": -1}, ConfigError), ({"preview_steps": 1.5}, ConfigError),
        ({"preview_decoder": text}, ConfigError), ({"batch_size": 0}, ConfigError),
        ({"preview_steps": 1, "preview_decoder": text}, ZImageError),
        ({"preview_steps": 1, "preview_decoder": tmp_path / "none"}, ZImageError),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            GenerationRun(pipe, RunSettings(**settings)).plan([GenerateConfig("x", **SIZE)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_the_command_line_names_the_option(name: str, model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    needed, values = BAD[name]
    output = tmp_path / "x.png"
    common = ["generate", f"--model-dir={model_dir}", "--prompt=x", f"--output={output}", "--backend=numpy"]
    sides = {} if name == "size" else SIZE
    options = [f"--{key.replace('_', '-')}={each}" for key, each in {**sides, **needed}.items()]
    flag = f"--{name.replace('_', '-')}"
    for value in values:
        text = value[0] if isinstance(value, tuple) else value
        try:
            code = main([*common, *options, f"{flag}={text}"])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        error = capsys.readouterr().err
        assert code in (1, 2) and flag in error and "Traceback" not in error, (text, error)
    assert not output.exists() and not list(tmp_path.glob("*.png"))
