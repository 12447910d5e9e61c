"""The options of a run: from the command line, from a file, from Python, and back."""

from __future__ import annotations

import io
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.training_runs import Workshop, pictures, workshop

from zimage_cli.app import main
from zimage_ref import ConfigError, TrainConfig
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.formats.quantize import Quantization
from zimage_ref.options_file import dump_options, read_options, to_json
from zimage_ref.training.config import LR
from zimage_ref.training.presets import PRESETS

# A value other than the default for every option
OTHER: dict[str, Any] = {
    "model_dir": Path("m"), "dataset": Path("d é"), "output": Path("x.safetensors"), "rank": 3, "alpha": 2.5,
    "epochs": 7, "steps": 9, "lr": 3e-5, "resolution": (512, 768), "batch_size": 2, "grad_accumulation": 4, "seed": 5,
    "trigger": 'sks "x"', "caption_dropout": 0.2, "repeats": 3, "flip": True, "max_upscale": 1.5, "square": True,
    "cache": Path("c"), "validation": "0.1", "validation_every": 11, "targets": ("attention", "adaln"),
    "optimizer": "lion", "weight_decay": 0.1, "warmup": 8, "schedule": "linear", "grad_clip": 0.5, "ema": 0.99,
    "lora_format": "kohya", "kind": "lokr", "factor": 8, "decompose_both": True, "init_lora": Path("i.safetensors"),
    "lora_plus": 16.0, "rank_dropout": 0.1, "timesteps": "shift=2.5", "base_precision": "8",
    "memory": "lean",
    "training_adapter": Path("a.safetensors"), "transformer": Path("t.npz"), "text_encoder": Path("q.npz"),
    "vae": Path("v.npz"), "tokenizer": Path("t.json"), "save_every": 6, "resume_every": 12, "keep_last": 2,
    "preview_prompt": ("a fox, in snow", "an owl"), "preview_every": 13, "preview_size": 256, "preview_steps": 4,
    "preview_guidance": 1.5, "resume": True, "resume_anyway": True, "overwrite": True,
    "force": True, "mask": "alpha", "mask_outside": 0.3, "caption_lines": True, "caption_choices": True,
    "shuffle_tags": True, "keep_tags": 2, "module_dropout": 0.25, "min_sigma": 0.1, "max_sigma": 0.9,
    "noise_offset": 0.05, "loss": "huber", "huber_delta": 0.2, "loss_weight": "flow-weighted",
    "differential_guidance": 3.0, "preserve": "dog", "preserve_blank": True, "preserve_every": 2,
    "preserve_prompt": ("a cat, asleep", "an owl"), "preserve_weight": 0.5,
    "log": ("tensorboard", "wandb"), "preview_first": False,
}  # fmt: skip
# A value that no run has beside the kind of OTHER
BESIDE_LORA: dict[str, Any] = {"model_dir": Path("m"), "dataset": Path("d é"), "dropout": 0.15}
OF_FULL: dict[str, Any] = {
    "model_dir": Path("m"), "dataset": Path("d é"), "output": Path("whole"), "kind": "full", "master_weights": True
}  # fmt: skip

FORMER_DUMP = """\
model_dir = "m"
dataset = "d"
output = "lora_weights.safetensors"
rank = 16
alpha = 16.0
epochs = 100
steps = 0
lr = 0.0
resolution = [256]
batch_size = 1
grad_accumulation = 1
seed = 0
trigger = ""
caption_dropout = 0.05
repeats = 1
flip = false
max_upscale = 1.0
square = false
validation = ""
validation_every = 50
lora_format = "comfy"
targets = ["attention", "feed_forward", "refiners"]
optimizer = "adamw"
weight_decay = 0.01
warmup = 20
schedule = "cosine"
grad_clip = 1.0
ema = 0.0
lora_plus = 1.0
rank_dropout = 0.0
timesteps = "auto"
base_precision = "auto"
memory = "auto"
save_every = 0
resume_every = 100
keep_last = 0
preview_prompt = []
preview_every = 250
preview_size = 0
preview_steps = 0
preview_guidance = -1.0
resume = false
resume_anyway = false
overwrite = false
force = false
"""


def test_the_values_above_are_of_every_option() -> None:
    named = {field.name for field in fields(TrainConfig)}
    assert OTHER.keys() | BESIDE_LORA.keys() | OF_FULL.keys() == named - {"datasets"}  # see test_datasets


@pytest.mark.parametrize("options", [OTHER, BESIDE_LORA, OF_FULL], ids=["other", "beside-lora", "full"])
def test_every_option_goes_through_toml_json_and_the_command_line(
    options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(**options)
    plain = TrainConfig(Path("n"), Path("e"))
    assert all(getattr(config, name) != getattr(plain, name) for name in options)
    (tmp_path / "o.toml").write_text(dump_options(config), encoding="utf-8")
    (tmp_path / "o.json").write_text(json.dumps(to_json(config)), encoding="utf-8")
    for name in ("o.toml", "o.json"):
        assert TrainConfig(**read_options(tmp_path / name, TrainConfig)) == config

    argv = ["train", "--dump-config"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if name in ("preview_prompt", "preserve_prompt"):
            argv += [part for prompt in value for part in (flag, prompt)]
        elif value is True:
            argv.append(flag)
        elif value is False:
            argv.append(flag.replace("--", "--no-", 1))
        else:
            argv += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    assert main(argv) == 0
    (tmp_path / "dumped.toml").write_text(capfd.readouterr().out, encoding="utf-8")
    assert TrainConfig(**read_options(tmp_path / "dumped.toml", TrainConfig)) == config


def test_the_command_line_comes_before_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "o.toml"
    file.write_text('model-dir = "m"\ndataset = "d"\nrank = 8\nlr = 1e-3\nbase-precision = 4\n', encoding="utf-8")
    argv = ["train", f"--config={file}", "--rank", "4", "--resolution", "512", "--resolution=768,1024", "--dump-config"]
    assert main(argv) == 0
    lines = capfd.readouterr().out.splitlines()
    expected = ("rank = 4", "lr = 0.001", 'base_precision = "4"', "resolution = [512, 768, 1024]", 'model_dir = "m"')
    assert set(expected) <= set(lines)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_nobody_else_does(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "o.toml"
    file.write_text('model_dir = "m"\ndataset = "d"\nepochs = 7\n', encoding="utf-8")
    assert main(["train", f"--config={file}", f"--preset={name}", "--rank=5", "--dump-config"]) == 0
    file.write_text(capfd.readouterr().out, encoding="utf-8")
    expected = {**PRESETS[name], "rank": 5, "epochs": 7}
    assert TrainConfig(**read_options(file, TrainConfig)) == TrainConfig(Path("m"), Path("d"), **expected)
    assert TrainConfig(Path("m"), Path("d"), **PRESETS[name]).resolution != (256,)


def test_prompts_to_preserve_come_from_options_and_a_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, dumped, stdin = tmp_path / "kept.txt", tmp_path / "o.toml", io.StringIO("from stdin\n")
    kept.write_text("\ufeffa dog, asleep\r\n\n  an owl\n", encoding="utf-8")
    argv = ["train", "--model-dir=m", "--dataset=d", "--dump-config"]
    for more, expected in (
        ([f"--preserve-prompt-file={kept}"], ["a dog, asleep", "an owl"]),
        (["--preserve-prompt=a cat, awake", f"--preserve-prompt-file={kept}", "--preserve-prompt=a tree"],
         ["a cat, awake", "a tree", "a dog, asleep", "an owl"]),
        (["--preserve-prompt-file=-"], ["from stdin"]),
    ):  # fmt: skip
        monkeypatch.setattr("sys.stdin", stdin)
        assert main([*argv, *more]) == 0
        dumped.write_text(capfd.readouterr().out, encoding="utf-8")
        assert list(read_options(dumped, TrainConfig)["preserve_prompt"]) == expected
    for content, message in ((None, "kept.txt: cannot be read as UTF-8 text"), (" \n", "kept.txt: holds no prompts")):
        kept.unlink() if content is None else kept.write_text(content, encoding="utf-8")
        assert main([*argv, f"--preserve-prompt-file={kept}"]) == 1
        assert message in " ".join(capfd.readouterr().err.split())


FORMER_AUTO = {"steps": 0, "lr": 0.0, "preview_size": 0, "preview_steps": 0, "preview_guidance": -1.0}


def test_what_a_run_decides_is_none_and_its_word_is_auto(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig("m", "d")
    assert {name: getattr(config, name) for name in (*FORMER_AUTO, "cache")} == dict.fromkeys([*FORMER_AUTO, "cache"])
    given = {name: value for name, value in OTHER.items() if name in FORMER_AUTO}
    file = tmp_path / "o.toml"
    file.write_text(dump_options(TrainConfig("m", "d", **given)), encoding="utf-8")
    words = [part for name in FORMER_AUTO for part in ("--" + name.replace("_", "-"), "auto")]
    assert main(["train", f"--config={file}", *words, "--dump-config"]) == 0
    assert capfd.readouterr().out == dump_options(config)
    file.write_text(dump_options(config) + "".join(f'{name} = "auto"\n' for name in FORMER_AUTO), encoding="utf-8")
    assert TrainConfig(**read_options(file, TrainConfig)) == config


@pytest.mark.parametrize(("name", "value"), [*FORMER_AUTO.items(), ("preview_guidance", -0.5)])
def test_the_number_that_meant_auto_before_still_does(
    name: str, value: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From Python, in a file of either kind, and on a command line, whatever else is there."""
    plain = TrainConfig("m", "d")
    assert TrainConfig("m", "d", **{name: value}) == plain
    (tmp_path / "o.toml").write_text(f"{name} = {value}\n" + dump_options(plain), encoding="utf-8")
    (tmp_path / "o.json").write_text(json.dumps(to_json(plain) | {name: value}), encoding="utf-8")
    for file in ("o.toml", "o.json"):
        assert TrainConfig(**read_options(tmp_path / file, TrainConfig)) == plain
        for text in (str(value), f"{value:g}"):
            argv = ["train", f"--config={tmp_path / file}", "--" + name.replace("_", "-"), text, "--dump-config"]
            assert main(argv) == 0
            assert capfd.readouterr().out == dump_options(plain)


def test_a_file_that_the_version_before_dumped_says_the_same(tmp_path: Path) -> None:
    """All lines of --dump-config as they were when 0 and -1 stood for auto."""
    (tmp_path / "o.toml").write_text(FORMER_DUMP, encoding="utf-8")
    assert TrainConfig(**read_options(tmp_path / "o.toml", TrainConfig)) == TrainConfig("m", "d")


def test_help_says_what_auto_comes_to(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    text = " ".join(capfd.readouterr().out.split())
    for name, fact in {
        "steps N": "as many as --epochs need",
        "lr X": "1e-4 for Z-Image, more if narrower, 1 for prodigy. It also depends on --kind",
        "preview-size N": "the largest --resolution", "preview-steps N": "8 for Turbo, 30 for the base model",
        "preview-guidance X": "0 for Turbo, 4 for the base model", "cache FOLDER": "zimage-cache beside --output",
    }.items():  # fmt: skip
        assert re.search(rf"--{name} [^:]*\. With auto, {re.escape(fact)}\. Default: auto", text), name
    assert "Default: None" not in text and LR == 1e-4


@pytest.mark.parametrize(
    ("name", "text", "fact"),
    [
        ("o.toml", "rnak = 3", "unknown option 'rnak': is rank meant?"),
        ("o.toml", "rank = 3.5", "rank: 3.5 is not a whole number"),
        ("o.toml", 'flip = "maybe"', "flip: 'maybe' is not true or false"),
        ("o.toml", "lr = true", "lr: True is not a number"),
        ("o.toml", "output = 3", "output: 3 is not a path"),
        ("o.toml", "rank = ", "cannot be read as TOML"),
        ("o.json", "[1]", "holds a JSON list"),
        ("o.yaml", "rank: 3", "options are read from .toml or .json"),
        ("gone.toml", None, "cannot be read as TOML"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path: Path, name: str, text: str | None, fact: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_options(tmp_path / name, TrainConfig)
    assert fact in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"rank": 0}, "`rank` 0 must be at least 1"),
        ({"lr": float("nan")}, "`lr` nan must be at least 0"),
        ({"resolution": 250}, "`resolution` 250 must be a multiple of 16: 256 is the nearest"),
        ({"resolution": ()}, "`resolution` needs at least one side"),
        ({"optimizer": "adamw4bit"}, "`optimizer` 'adamw4bit' is unknown: known are auto, adamw"),
        ({"targets": "atention"}, "`targets` 'atention' is unknown: known are attention"),
        ({"preview_size": 40}, "`preview_size` 40 must be a multiple of 16"),
        ({"schedule": "step"}, "`schedule` 'step' is unknown"),
        ({"lora_format": "ggml"}, "`lora_format` 'ggml' is unknown"),
        ({"base_precision": "2"}, "`base_precision` '2' is unknown"),
        ({"timesteps": "gauss"}, "`timesteps` 'gauss' is unknown"),
        ({"timesteps": "shift=-1"}, "shift=S takes a number above 0"),
        ({"ema": 1.0}, "`ema` 1.0 must be at least 0 and below 1"),
        ({"caption_dropout": 1.5}, "`caption_dropout` 1.5 must be at most 1"),
        ({"output": "x.npz"}, "a LoRA is written as .safetensors"),
        ({"grad_clip": -1.0}, "`grad_clip` -1.0 must be at least 0"),
        ({"max_upscale": 0.5}, "`max_upscale` 0.5 must be at least 1"),
    ],
)
def test_values_out_of_bounds_are_refused(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig("m", "d", **options)
    assert fact in str(error.value)


def test_what_must_be_given_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model-dir", "m"]) == 1
    assert "--dataset must be given, or [[dataset]] tables in a file of options" in capfd.readouterr().err


def test_a_dry_run_shows_the_plan_and_reads_no_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pytest.importorskip("zimage_mlx.pipeline", reason="training needs MLX", exc_type=ImportError)
    shop: Workshop = workshop(tmp_path)
    data = pictures(tmp_path / "shapes", (40, 40), (44, 40), (64, 32), (64, 36))
    monkeypatch.setattr(pipeline, "load", lambda *_: pytest.fail("weights were loaded"))
    argv = ["train", f"--model-dir={shop.model}", f"--dataset={data}", f"--output={tmp_path}/x.safetensors"]
    assert main([*argv, "--dry-run", "--resolution=32", "--rank=4", "--epochs=3", "--validation=0.25"]) == 0
    out = " ".join(capfd.readouterr().out.replace("│", " ").replace("┃", " ").split())
    assert (
        "pictures 3, 1 held out" in out and "steps 9, of 3 an epoch" in out and "learning rate 0.000632, cosine" in out
    )
    assert "base Turbo in float32" in out and "LoRA 28 layers, rank 4: 29,184 parameters" in out
    assert "32 32" in out and "32 16" in out and "largest stage" in out and "memory, about" in out
    assert not (tmp_path / "x.run").exists() and not (tmp_path / "zimage-cache").exists()
    file = tmp_path / "q4.npz"
    write_model(open_source(shop.model, "transformer"), Target(file, "transformer", quantization=Quantization(4)))
    for words, *options in (
        ("Turbo in 4 bits as stored", f"--transformer={file}"),
        ("in 8 bits", "--base-precision=8"),
        ("preserved │ no caption; every step, weight 1", "--preserve-blank"),
        ("preserved │ a cat, 1 prompt; every 6 steps, weight 2.5", "--preserve=a cat", "--preserve-prompt=a dog, a",
         "--trigger=x", "--preserve-every=6", "--preserve-weight=2.5"),
    ):  # fmt: skip
        assert main([*argv, "--dry-run", "--resolution=32", *options]) == 0
        assert words in " ".join(capfd.readouterr().out.split())
