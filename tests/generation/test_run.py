"""A run for pictures as a server would use it: no console, no command line, nothing printed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.cases import random_lora
from support.networks import pipeline

from zimage_cli.app import main
from zimage_ref import ConfigError, FormatError, GenerateConfig, ZImagePipeline
from zimage_ref.generation import loras, provenance
from zimage_ref.generation.provenance import ModelChoice, Repeat, digest
from zimage_ref.generation.run import GenerationRun, MadePicture, RunSettings, open_pipeline
from zimage_ref.lora.file import write_lora
from zimage_ref.memory import LEAN, Stage
from zimage_ref.networks.weights import Weights
from zimage_ref.pictures.images import encoded, save_picture
from zimage_ref.pictures.metadata import read_record

SIZE: dict[str, Any] = {"width": 48, "height": 32, "steps": 2}


@pytest.fixture
def fox(tmp_path: Path) -> Path:
    return lora_file(tmp_path / "fox.safetensors", seed=0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from here on."""
    seen: list[str] = []

    def counted(path: Path) -> str:
        seen.append(path.name)
        return digest(path)

    monkeypatch.setattr(loras, "digest", counted)
    monkeypatch.setattr(provenance, "digest", counted)
    return seen


@pytest.fixture
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fails the test if anything is printed."""
    yield
    assert capfd.readouterr() == ("", "")


def lora_file(path: Path, seed: int) -> Path:
    write_lora(path, random_lora(rank=4, seed=seed), {"rank": 4})
    return path


def configs(count: int, **options: Any) -> list[GenerateConfig]:
    return [GenerateConfig("a fox", seed=seed, **(SIZE | options)) for seed in range(count)]


def made_by(run: GenerationRun, wanted: list[GenerateConfig]) -> list[MadePicture]:
    return list(run.make(run.plan(wanted)))


@pytest.mark.usefixtures("silent")
def test_a_server_makes_pictures_with_one_lora_and_then_with_another(pipe: Any, fox: Path, tmp_path: Path) -> None:
    snow = lora_file(tmp_path / "snow.safetensors", seed=1)
    notices: list[str] = []
    stages: list[str] = []
    run = GenerationRun(pipe, RunSettings(batch_size=2, keep_model=True), loras=[(fox, 0.8)])
    requests = run.plan(configs(3), notices.append)
    first = list(run.make(requests, progress=lambda stage, done, total: stages.append(stage)))
    assert [made.index for made in first] == [0, 1, 2] and [made.request for made in first] == requests
    stage_order = ["encode", *["denoise"] * 2, *["decode"] * 2, *["denoise"] * 2, "decode"]
    assert stages == stage_order  # two batches of two steps: what is denoised is decoded at once
    run.use_loras([snow])
    second = made_by(run, configs(1))
    assert (np.asarray(second[0].picture) != np.asarray(first[0].picture)).any()
    assert [made.record["loras"] for made in (first[0], second[0]) if made.record] == [
        [{"file": str(fox), "scale": 0.8, "sha256": digest(fox)}],
        [{"file": str(snow), "scale": 1.0, "sha256": digest(snow)}],
    ]
    again = GenerationRun(pipe, RunSettings(batch_size=2), loras=[(fox, 0.8)])  # another run on the same pipeline
    assert [encoded(made.picture, "PNG", made.record) for made in made_by(again, configs(3))] == [
        encoded(made.picture, "PNG", made.record) for made in first
    ]
    assert notices == []


def test_pictures_and_records_are_those_of_the_command_line(
    pipe: Any, model_dir: Path, fox: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.photograph(70, 50, 1).save(tmp_path / "in.png")
    options = {"init_image": tmp_path / "in.png", "strength": 0.7, "guidance": 2.0, "negative_prompt": "snow"}
    run = GenerationRun(pipe, RunSettings(batch_size=2), loras=[(fox, 0.5)])
    ours = made_by(run, configs(2, **options))
    assert capfd.readouterr() == ("", "")
    argv = [
        "generate", f"--model-dir={model_dir}", f"--backend={pipe.backend}", "--dtype=float32", "--prompt=a fox",
        "--count=2", "--batch-size=2", "--width=48", "--height=32", "--steps=2", f"--lora={fox}:0.5",
        *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()),
    ]  # fmt: skip
    assert main([*argv, f"--output={tmp_path}/{{index}}.png"]) == 0
    for made in ours:
        theirs = tmp_path / f"{made.index + 1}.png"
        assert made.record == read_record(theirs)
        assert encoded(made.picture, "PNG", made.record) == theirs.read_bytes()


@pytest.mark.usefixtures("silent")
def test_a_picture_is_made_again_from_its_file(pipe: Any, fox: Path, tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    (made,) = made_by(GenerationRun(pipe, loras=[(fox, 0.8)]), configs(1, sampler="heun"))
    save_picture(made.picture, path, made.record)

    repeat = Repeat.read(path)
    opened = open_pipeline(type(pipe), ModelChoice(), repeat.choice)
    run = GenerationRun(opened, loras=[(lora.path, lora.scale) for lora in repeat.loras])
    assert run.changes(repeat) == [] and opened.precision == "float32"
    (again,) = made_by(run, [repeat.config()])
    assert encoded(again.picture, "PNG", again.record) == path.read_bytes()
    (other,) = made_by(run, [repeat.config(seed=5)])
    assert other.record == {**(made.record or {}), "seed": 5}

    lora_file(fox, seed=3)
    assert run.changes(repeat) == [f"{fox}: is not the same as when {path} was made: the picture will differ"]


def test_what_a_choice_leaves_open_is_as_it_was_recorded() -> None:
    recorded = ModelChoice("model", "mlx", "bfloat16", 8, {"vae": Path("a"), "tokenizer": Path("b")})
    asked = ModelChoice(dtype="float64", parts={"vae": Path("c")})
    parts = {"vae": Path("c"), "tokenizer": Path("b")}
    assert asked.otherwise(recorded, ["float32"]) == ModelChoice("model", "mlx", "float64", 8, parts)
    assert ModelChoice("other").otherwise(recorded, ["float32"]).dtype is None  # the engine does not have it
    assert ModelChoice("other").otherwise(recorded, ["bfloat16"]).dtype == "bfloat16"
    with pytest.raises(ConfigError, match="`model_dir` must be given"):
        open_pipeline(ZImagePipeline, ModelChoice())


@pytest.mark.usefixtures("silent")
def test_each_file_is_hashed_once_a_run(pipe: Any, fox: Path, tmp_path: Path, hashed: list[str]) -> None:
    tiny.photograph(48, 32, 1).save(tmp_path / "in.png")
    run = GenerationRun(pipe, RunSettings(batch_size=5), loras=[fox, (fox, 0.5)])
    wanted = configs(20, init_image=tmp_path / "in.png", strength=0.5, steps=2)
    made = made_by(run, wanted)
    assert len(made) == 20 and hashed == ["fox.safetensors"]  # and in.png when it was read
    made_by(run, configs(1))
    assert hashed.count("fox.safetensors") == 1  # with the model kept, too
    lora_file(fox, seed=1)
    (changed,) = made_by(run, configs(1))
    assert hashed.count("fox.safetensors") == 2
    assert changed.record is not None and changed.record["loras"][0]["sha256"] == digest(fox)


def test_the_command_line_hashes_a_lora_once_a_run(
    model_dir: Path, fox: Path, tmp_path: Path, hashed: list[str]
) -> None:
    argv = ["generate", "--backend=numpy", "--width=32", "--height=32", "--steps=1", "--count=5"]
    pictures = f"--output={tmp_path}/{{index}}.png"
    assert main([*argv, f"--model-dir={model_dir}", "--prompt=x", f"--lora={fox}", pictures]) == 0
    assert hashed == ["fox.safetensors"]
    assert main([*argv, f"--from-image={tmp_path}/1.png", pictures, "--overwrite"]) == 0
    assert hashed == ["fox.safetensors"] * 2
    assert main([*argv, f"--model-dir={model_dir}", "--prompt=x", f"--lora={fox}", "--no-metadata", pictures,
                 "--overwrite"]) == 0  # fmt: skip
    assert hashed == ["fox.safetensors"] * 2  # no record, no digest


@pytest.mark.usefixtures("silent")
def test_previews_come_every_so_many_steps_with_the_place_of_their_picture(pipe: Any) -> None:
    shown: list[tuple[int, np.ndarray]] = []
    run = GenerationRun(pipe, RunSettings(batch_size=2, preview_steps=2, metadata=False))
    requests = run.plan(configs(3, steps=5))
    made = list(run.make(requests, preview=lambda index, picture: shown.append((index, np.asarray(picture, int)))))
    assert [index for index, _ in shown] == [0, 1, 0, 1, 2, 2]  # two batches, after steps 2 and 4
    first = np.asarray(made[0].picture, int)
    assert 0 < np.abs(shown[2][1] - first).mean() < np.abs(shown[0][1] - first).mean()
    assert [one.record for one in made] == [None] * 3


@pytest.mark.usefixtures("silent")
def test_notices_are_told_and_not_printed(pipe: Any) -> None:
    notices: list[str] = []
    long = GenerateConfig("snow " * 600, **SIZE)
    GenerationRun(pipe).plan([long, long, *configs(1)], notices.append)
    assert len(notices) == 1 and notices[0].startswith("prompt cut after 512 of ")
    GenerationRun(pipe).plan([long])


@pytest.mark.parametrize(
    ("settings", "config", "lora", "fact"),
    [
        ({}, {"negative_prompt": "snow"}, "", "`negative_prompt` does nothing without guidance"),
        ({}, {}, "missing.safetensors", "missing.safetensors"),
        ({"batch_size": 0}, {}, "", "`batch_size` 0 must be at least 1"),
        ({"preview_steps": -1}, {}, "", "`preview_steps` -1 must be at least 0"),
        ({"memory": "much"}, {}, "", "`memory` 'much' is unknown: known are auto, lean, fast"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_weights(
    settings: Any, config: Any, lora: str, fact: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weights, "__getitem__", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(provenance.FormatError if lora else ConfigError, match=fact) as caught:
        run = GenerationRun(pipeline("numpy", model_dir), RunSettings(**settings), [lora] if lora else [])
        run.plan(configs(1, **config))
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)


def test_what_does_not_fit_into_memory_is_refused_unless_forced(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline("numpy", model_dir)
    monkeypatch.setattr(type(pipe), "memory_limit", lambda self: 1000)
    with pytest.raises(ConfigError, match="there are 0.0 GB: .*`force` tries it"):
        GenerationRun(pipe).plan(configs(1))
    assert len(GenerationRun(pipe, RunSettings(force=True)).plan(configs(2))) == 2


@pytest.mark.parametrize(
    ("memory", "keep_model", "limit", "mode"),
    [
        ("auto", False, None, "lean"), ("auto", True, None, "fast"),
        ("auto", True, 100, "fast"), ("auto", True, 99, "lean"), ("auto", False, 1000, "lean"),
        ("auto", True, 49, "stream"), ("auto", False, 49, "stream"), ("auto", False, 1, "stream"),
        ("fast", True, 1, "fast"), ("fast", False, 1, "fast"), ("lean", True, None, "lean"),
        ("stream", False, None, "stream"),
    ],
)  # fmt: skip
def test_the_memory_mode_follows_from_what_is_asked_and_what_there_is(
    memory: str, keep_model: bool, limit: int | None, mode: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, needs = pipeline("numpy", model_dir), {"fast": 100, "lean": 50, "stream": 20}
    requests = pipe.plan(configs(1))
    monkeypatch.setattr(type(pipe), "memory", lambda self, requests, batch, mode: [Stage("x", 1, needs[mode] - 1)])
    monkeypatch.setattr(type(pipe), "memory_limit", lambda self: limit)
    monkeypatch.setattr(type(pipe), "footprint", lambda self, mode: LEAN)
    assert GenerationRun(pipe, RunSettings(memory=memory, keep_model=keep_model)).memory(requests).mode == mode


@pytest.mark.parametrize(
    ("seconds", "limit", "mode"),
    [
        ({"fast": 10, "lean": 8}, 100, "lean"), ({"fast": 10, "lean": 9.5}, 100, "fast"), ({"lean": 8}, 100, "fast"),
        ({"fast": 10, "lean": 8}, 49, "stream"), ({"fast": 10, "lean": 11}, 99, "lean"),
        ({"fast": 10, "lean": 11, "stream": 1}, 100, "fast"),
    ],
)  # fmt: skip
def test_auto_takes_lean_if_it_is_measured_to_be_clearly_faster(
    seconds: dict[str, float], limit: int, mode: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, needs, asked = pipeline("numpy", model_dir), {"fast": 100, "lean": 50, "stream": 20}, []
    requests = pipe.plan(configs(1, width=32, height=48, steps=3, guidance=2, sampler="heun"))
    monkeypatch.setattr(type(pipe), "memory", lambda self, requests, batch, mode: [Stage("x", 1, needs[mode] - 1)])
    monkeypatch.setattr(type(pipe), "memory_limit", lambda self: limit)
    monkeypatch.setattr(type(pipe), "footprint", lambda self, mode: LEAN)
    monkeypatch.setattr(
        type(pipe), "measured_seconds", lambda self, mode, *size: asked.append(size) or seconds.get(mode)
    )
    choice = GenerationRun(pipe, RunSettings(keep_model=True)).memory(requests)
    assert choice.mode == mode and ("by `zimage doctor`" in choice.reason) is (
        seconds.get("lean") == 8 and "fast" in seconds
    )
    assert {*asked} == {(32 * 48, 2 * (2 * 3 - 1))}
    assert GenerationRun(pipe, RunSettings(keep_model=True, memory="fast")).memory(requests).mode == "fast"


def test_the_engine_that_maps_weights_need_not_stream(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("numpy", model_dir)
    monkeypatch.setattr(type(pipe), "memory_limit", lambda self: 1)
    assert GenerationRun(pipe).memory(pipe.plan(configs(1))).mode == "lean"


def test_deciding_the_memory_mode_changes_nothing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.set_mode("fast")
    requests = pipe.plan(configs(1))
    lean, fast = (pipe.memory(requests, 1, mode) for mode in ("lean", "fast"))
    assert sum(stage.weights for stage in lean) < sum(stage.weights for stage in fast)
    limit = max(stage.total for stage in lean)  # enough for one network at a time, not for all
    monkeypatch.setattr(type(pipe), "memory_limit", lambda self: limit)
    run = GenerationRun(pipe, RunSettings(keep_model=True))
    assert not pipe.lean
    assert run.memory(run.plan(configs(1))).mode == "lean" and not pipe.lean
    for _ in run.make(requests):
        assert pipe.lean
    pipe.set_mode("fast")
    assert pipe.memory(requests, 1) == fast


def test_the_record_is_of_the_picture_that_was_used_and_remarks_are_told(pipe: Any, tmp_path: Path) -> None:
    source, told = tmp_path / "in.gif", list[str]()
    tiny.photograph(48, 32, seed=1).save(source, save_all=True, append_images=[tiny.photograph(48, 32, seed=2)])
    used = digest(source)
    run = GenerationRun(pipe, RunSettings())
    requests = run.plan([GenerateConfig("a fox", init_image=source, mask=source, **SIZE)], told.append)
    tiny.photograph(48, 32, seed=3).save(source)
    ((made,),) = [list(run.make(requests))]
    assert made.record is not None
    assert made.record["init_image_sha256"] == made.record["mask_sha256"] == used != digest(source)
    assert told == [f"{source}: holds 2 pictures: only the first is used"]


def test_a_lora_that_changes_between_reading_and_recording_is_refused(pipe: Any, fox: Path) -> None:
    run = GenerationRun(pipe, RunSettings(), [fox])
    (read,) = run.read_loras()
    lora_file(fox, seed=5)
    os.utime(fox, (1, 1))
    with pytest.raises(FormatError, match=r"fox\.safetensors: was changed after it was checked: start again"):
        _ = read.recorded
