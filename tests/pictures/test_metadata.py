"""How a picture was made, in the picture: written, read, shown and made again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from support import tiny
from support.cases import random_lora

from zimage_cli.app import main
from zimage_cli.terminal.console import Console
from zimage_ref import FormatError, GenerateConfig, ModelFolder, ZImageError
from zimage_ref.checkpoints.registry import part_options
from zimage_ref.generation.provenance import RecordedLoRA, Recorder, Repeat, digest, identity
from zimage_ref.generation.run import GenerationRun
from zimage_ref.lora.file import write_lora
from zimage_ref.pictures.images import save_picture
from zimage_ref.pictures.metadata import KEY, metadata, parameters, read_record

RECORD = {
    "prompt": 'a "red" fox — 狐 🦊\nin snow', "negative_prompt": "soft", "seed": 7, "steps": 8, "guidance": 1.5,
    "sampler": "heun", "width": 48, "height": 32, "model": "models/Z-Image-Turbo", "version": "0.1.0",
    "loras": [{"file": "a b/fox.safetensors", "scale": 0.8, "sha256": "0123"}],
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
def test_a_record_comes_back_from_every_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    save_picture(tiny.photograph(48, 32, 1), path, RECORD)
    assert read_record(path) == RECORD
    with Image.open(path) as picture:
        assert picture.size == (48, 32)


def test_a_png_shows_other_tools_the_line_that_they_know(tmp_path: Path) -> None:
    save_picture(tiny.photograph(48, 32, 1), tmp_path / "picture.png", RECORD)
    with Image.open(tmp_path / "picture.png") as picture:
        text = picture.info["parameters"]
    assert text == parameters(RECORD)
    assert text.splitlines()[2:] == [
        "Negative prompt: soft",
        "Steps: 8, Sampler: heun, CFG scale: 1.5, Seed: 7, Size: 48x32, Model: Z-Image-Turbo, Lora: fox:0.8, "
        "Version: 0.1.0",
    ]


def test_metadata_that_a_format_cannot_hold_is_refused() -> None:
    with pytest.raises(FormatError, match="do not fit a JPEG: write a PNG"):
        metadata("JPEG", RECORD | {"prompt": "x" * 70_000})
    assert "pnginfo" in metadata("PNG", RECORD | {"prompt": "x" * 70_000})


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda path: path.write_bytes(b"no picture"), "cannot be read as a picture"),
        (lambda path: save_picture(tiny.photograph(16, 16, 1), path), "does not say how it was made"),
        (lambda path: save_picture(tiny.photograph(16, 16, 1), path, {"prompt": "x"}), "cannot be understood"),
        (lambda path: save_picture(tiny.photograph(16, 16, 1), path, RECORD | {"steps": "many"}), "steps: 'many'"),
    ],
    ids=["no picture", "no record", "half a record", "wrong type"],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_that_cannot_be_repeated_is_one_line(
    make, fact: str, suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"picture{suffix}"
    make(path)
    assert main(["generate", f"--from-image={path}", f"--output={tmp_path}/again.png"]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: {path}: ") and fact in error and error.count("\n") == 1
    assert not (tmp_path / "again.png").exists()


def test_a_record_that_was_tampered_with_is_shown_or_refused_but_never_a_traceback(
    model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = GenerateConfig("x", width=32, height=32, steps=1), tmp_path / "picture.png"
    facts = {**identity(ModelFolder.open(model_dir)), "backend": "numpy", "version": "1"}
    made = Recorder(facts).record(config)
    engine = ("backend", "dtype", "quantize", *part_options())
    monkeypatch.setattr(GenerationRun, "make", lambda *_: iter(()))
    monkeypatch.setattr(Console, "facts", lambda *_: None)
    read, answers = [], []
    for name in dict.fromkeys([*made, *engine, "init_image"]):
        for value in (None, -1.5, "x", [], [1], {"a": 1}, 1e999):
            info = PngImagePlugin.PngInfo()
            info.add_itxt(KEY, json.dumps(made | {name: value}))
            tiny.photograph(16, 16, 1).save(path, pnginfo=info)
            assert main(["inspect", f"--input={path}"]) == 0
            try:
                read.append(GenerateConfig(**Repeat.of(read_record(path), path).options))
            except ZImageError as error:
                assert "\n" not in str(error)
            if name in (*engine, "model") and value != -1.5:
                capfd.readouterr()
                answers.append(main(["generate", f"--from-image={path}", f"--output={tmp_path}/x.png"]))
                errors = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning: ")]
                assert answers[-1] == len(errors) and all(line.startswith("error: ") for line in errors), (name, value)
    assert len(read) > 40 and answers.count(1) > 30 and answers.count(0) > 5


def test_the_fingerprint_of_a_model_tells_weights_apart(tmp_path: Path, model_dir: Path) -> None:
    same = ModelFolder.open(tiny.write_model_folder(tmp_path / "same"))
    half = ModelFolder.open(tiny.write_model_folder(tmp_path / "half", dtype="f16"))
    model = ModelFolder.open(model_dir)
    first, second, third = (identity(m)["model_fingerprint"] for m in (model, same, half))
    assert first == second != third
    same.weights["vae"]["decoder.conv_in.bias"] = half.weights["vae"]["encoder.conv_in.bias"].cast("f32")
    assert identity(same)["model_fingerprint"] != first


def test_a_record_holds_all_that_a_config_says(model_dir: Path, tmp_path: Path) -> None:
    tiny.photograph(32, 32, 1).save(tmp_path / "in.png")
    config = GenerateConfig(
        "a fox", negative_prompt="snow", width=32, height=48, steps=3, guidance=2.5, shift=2.0, sampler="dpm++2m",
        cfg_normalization=1.0, cfg_truncation=0.5, seed=9, init_image=str(tmp_path / "in.png"), strength=0.4,
        mask=str(tmp_path / "in.png"), fit="pad",
    )  # fmt: skip
    lora = RecordedLoRA(tmp_path / "in.png", 0.5, digest(tmp_path / "in.png"))
    recorder = Recorder(identity(ModelFolder.open(model_dir)), [lora])
    made = json.loads(json.dumps(recorder.record(config)))
    again = Repeat.of(made, tmp_path / "out.png")
    assert GenerateConfig(**again.options) == config
    assert again.config() == config and again.config(seed=3) == replace(config, seed=3)
    assert again.loras == [lora] and again.choice.model == str(model_dir)
    assert again.changes(identity(ModelFolder.open(model_dir)), again.loras) == []
    tiny.photograph(32, 32, 2).save(tmp_path / "in.png")
    now = replace(lora, sha256=digest(lora.path))
    assert len(again.changes(identity(ModelFolder.open(model_dir)), [now])) == 3  # as LoRA, picture and mask


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_a_picture_is_made_again_exactly_and_shown_by_inspect(
    suffix: str, model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.photograph(70, 50, 1).save(tmp_path / "in.png")
    first, again, other = (tmp_path / f"{name}{suffix}" for name in ("first", "again", "other"))
    options = ["--guidance=2", "--negative-prompt=snow", "--steps=3", "--sampler=heun", "--seed=11", "--strength=0.5"]
    argv = [
        "generate",
        "--backend=numpy",
        f"--model-dir={model_dir}",
        "--prompt=soft waves",
        f"--init-image={tmp_path}/in.png",
        *options,
    ]
    assert main([*argv, f"--output={first}"]) == 0
    assert main(["generate", f"--from-image={first}", f"--output={again}"]) == 0
    assert first.read_bytes() == again.read_bytes()
    assert main(["generate", f"--from-image={first}", "--seed=12", f"--output={other}"]) == 0
    assert read_record(other) == read_record(first) | {"seed": 12}
    capfd.readouterr()
    assert main(["inspect", f"--input={first}"]) == 0
    shown = capfd.readouterr().out
    for fact in ("soft waves", "snow", "heun", "11", "0.5", "in.png", model_dir.name):
        assert fact in shown

    tiny.photograph(70, 50, 2).save(tmp_path / "in.png")
    assert main(["generate", f"--from-image={first}", f"--output={again}", "--overwrite"]) == 0
    assert "in.png: is not the same as when" in capfd.readouterr().err
    assert (np.asarray(Image.open(again)) != np.asarray(Image.open(first))).any()


def test_loras_are_recorded_with_their_scales_and_used_again(
    model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lora(Path("fox.safetensors"), random_lora(rank=4, seed=0), {"rank": 4})
    argv = ["generate", "--backend=numpy", f"--model-dir={model_dir}", "--prompt=x", "--width=48", "--height=32"]
    assert main([*argv, "--steps=2", "--output=plain.png"]) == 0
    assert main([*argv, "--steps=2", "--output=first.png", "--lora=fox.safetensors:0.8"]) == 0
    assert main(["generate", "--from-image=first.png", "--output=again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("first.png").read_bytes()
    assert (np.asarray(Image.open("first.png")) != np.asarray(Image.open("plain.png"))).any()
    assert main(["inspect", "--input=first.png"]) == 0
    assert "fox.safetensors at 0.8" in capfd.readouterr().out
    write_lora(Path("fox.safetensors"), random_lora(rank=4, seed=1), {"rank": 4})
    assert main(["generate", "--from-image=first.png", "--output=changed.png"]) == 0
    assert "fox.safetensors: is not the same as when first.png was made" in capfd.readouterr().err


def test_no_metadata_leaves_nothing_but_the_picture(model_dir: Path, tmp_path: Path) -> None:
    argv = [
        "generate",
        "--backend=numpy",
        f"--model-dir={model_dir}",
        "--prompt=x",
        "--width=32",
        "--height=32",
        "--steps=1",
    ]
    for name in ("picture.png", "picture.jpg"):
        assert main([*argv, "--no-metadata", f"--output={tmp_path / name}"]) == 0
        with Image.open(tmp_path / name) as picture:
            assert not picture.getexif() and "zimage" not in picture.info and "parameters" not in picture.info
        with pytest.raises(FormatError, match="does not say"):
            read_record(tmp_path / name)
