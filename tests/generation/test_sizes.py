"""Sizes in words, presets, and LoRAs named by their repository."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.cases import random_lora

from zimage_cli.app import main
from zimage_ref import ConfigError, GenerateConfig, ZImagePipeline
from zimage_ref.checkpoints import hub
from zimage_ref.generation.config import config_of
from zimage_ref.generation.presets import BASE, PRESETS, TURBO, defaults_for, misfit
from zimage_ref.generation.run import GenerationRun
from zimage_ref.generation.sizes import SIDE_MULTIPLE, parse_size, random_seed
from zimage_ref.lora.file import write_lora
from zimage_ref.model.config import SchedulerConfig
from zimage_ref.pictures.metadata import read_record

NAME = "someone/foxes:sub/fox.safetensors"


@pytest.mark.parametrize(
    ("text", "sides", "size"),
    [
        ("1024", {}, (1024, 1024)), ("1024x768", {}, (1024, 768)), (" 640 X 480 ", {}, (640, 480)),
        ("1:1", {}, (512, 512)), ("3:4", {}, (448, 592)), ("16:9", {}, (688, 384)), ("2.35:1", {}, (784, 336)),
        ("3:4", {"width": 768}, (768, 1024)), ("3:4", {"height": 1024}, (768, 1024)),
    ],
)  # fmt: skip
def test_a_size_is_a_side_or_two_or_a_shape(text: str, sides: dict[str, int], size: tuple[int, int]) -> None:
    assert parse_size(text, **sides) == size
    config = config_of({"prompt": "x", "size": text, **sides})
    assert (config.width, config.height) == size
    assert all(side % SIDE_MULTIPLE == 0 for side in size)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"size": "big"}, "give a side"), ({"size": "0:1"}, "give a side"), ({"size": ""}, "give a side"),
        ({"size": "64x"}, "give a side"), ({"size": "64", "width": 64}, "leave `width`"),
        ({"size": "1:2", "width": 64, "height": 64}, "leaves one of"), ({"size": "1000"}, "1008 is the nearest|992"),
        ({"size": "9000"}, "must be a multiple"), ({"size": "4096"}, "more than 2048 x 2048"),
    ],
)  # fmt: skip
def test_a_wrong_size_is_one_line(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        config_of({"prompt": "x", **options})


def test_each_model_has_its_defaults_in_one_place() -> None:
    assert defaults_for(SchedulerConfig(shift=3.0)) is TURBO and defaults_for(SchedulerConfig(shift=6.0)) is BASE
    for name, shift, other in (("turbo", 3.0, 6.0), ("base", 6.0, 3.0), ("base-distilled-8", 6.0, 3.0)):
        config_of({"prompt": "x", **PRESETS[name].options})
        assert misfit(name, SchedulerConfig(shift=shift)) == "" != misfit(name, SchedulerConfig(shift=other))
    assert PRESETS["base"].options["steps"] == 50 and PRESETS["base"].options["guidance"] == 4.0


def test_random_seeds_differ() -> None:
    seeds = {random_seed() for _ in range(9)}
    assert len(seeds) > 1 and all(GenerateConfig("x", seed=seed) for seed in seeds)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """Stands for the hub, with NAME and the LoRA of the distilled preset: who asks for what, and whether locally."""
    path, seen = tmp_path / "cache.safetensors", []
    write_lora(path, random_lora(rank=4, seed=0), {"rank": 4})
    (preset, _), = PRESETS["base-distilled-8"].loras  # fmt: skip

    def download(repository: str, file: str, local_files_only: bool = False) -> str:
        seen.append((repository, file, local_files_only))
        if f"{repository}:{file}" not in (NAME, preset) or (local_files_only and "distill" in file.lower()):
            raise OSError("no such file")
        return str(path)

    stand_in = SimpleNamespace(hf_hub_download=download, errors=SimpleNamespace(HfHubHTTPError=OSError))
    monkeypatch.setattr(hub, "optional_import", lambda package, need: stand_in)
    return seen


def test_a_lora_by_its_repository_comes_from_the_cache_first(asked, model_dir: Path, tmp_path: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(model_dir)
    run = GenerationRun(pipe, loras=[(NAME, 0.5)])
    (made,) = run.make(run.plan([GenerateConfig("x", width=32, height=32, steps=1)]))
    assert set(asked) == {("someone/foxes", "sub/fox.safetensors", True)}
    local = GenerationRun(pipe, loras=[(tmp_path / "cache.safetensors", 0.5)])
    (same,) = local.make(local.plan([GenerateConfig("x", width=32, height=32, steps=1)]))
    assert made.picture == same.picture and made.record and same.record
    (ours,), (theirs,) = made.record["loras"], same.record["loras"]  # type: ignore[misc]
    assert ours == {**theirs, "file": NAME}
    with pytest.raises(ConfigError, match="neither a file nor one that can be downloaded: no such file"):
        run.use_loras([("someone/foxes:cat.safetensors", 1.0)])


def test_a_preset_sets_options_and_its_lora_unless_you_do(
    asked, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["generate", f"--model-dir={model_dir}", "--backend=numpy", "--size=32x48", "--prompt=x"]
    assert main([*argv, "--preset=base-distilled-8", "--steps=2", "--output=a.png"]) == 0
    record = read_record(tmp_path / "a.png")
    assert (record["steps"], record["guidance"], record["width"], record["height"]) == (2, 0, 32, 48)
    assert record["loras"][0]["file"].startswith("alibaba-pai/") and record["loras"][0]["scale"] == 0.8
    assert "is for the base model, and this is Turbo" in capfd.readouterr().err
    assert [local for *_, local in asked][:2] == [True, False]  # the cache, then the network
    again = ["generate", "--from-image=a.png", "--preset=base", "--lora", NAME, "--steps=1", "--output=b.png"]
    assert main([*again, "--spacing=karras"]) == 0
    record = read_record(tmp_path / "b.png")
    assert (record["guidance"], record["shift"], record["loras"][0]["file"]) == (4.0, 6.0, NAME)
    assert record["spacing"] == "karras"


def test_a_random_seed_is_recorded_and_a_spacing_changes_the_picture(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["generate", f"--model-dir={model_dir}", "--backend=numpy", "--size=32", "--prompt=x", "--steps=3"]
    assert main([*argv, "--seed=random", "--output=a.png"]) == 0
    seed = read_record(tmp_path / "a.png")["seed"]
    assert str(seed) in capfd.readouterr().err
    assert main([*argv, f"--seed={seed}", "--output=b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() and b'"spacing"' not in Path("a.png").read_bytes()
    for spacing in ("beta", "karras", "exponential"):
        assert main([*argv, f"--seed={seed}", f"--spacing={spacing}", "--output=c.png", "--overwrite"]) == 0
        assert main(["generate", "--from-image=c.png", "--output=d.png", "--overwrite"]) == 0
        assert Path("a.png").read_bytes() != Path("c.png").read_bytes() == Path("d.png").read_bytes()
