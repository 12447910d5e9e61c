"""The command line as its users meet it: output, errors, exit codes, what is left on disk."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import tiny

from zimage_cli import app
from zimage_cli.app import main
from zimage_cli.commands import COMMANDS
from zimage_ref import TrainConfig
from zimage_ref.formats import npz, safetensors
from zimage_ref.training import config as training_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("cli") / "model")


@pytest.mark.slow
def test_a_picture_is_made_without_mlx(model: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['mlx'] = None; from zimage_cli.app import main; sys.exit(main(sys.argv[1:]))"
    argv = ["generate", f"--model-dir={model}", "--prompt=a fox", "--width=32", "--height=48", "--steps=2"]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "output.png\n"), done.stderr  # the result alone is on stdout
    with Image.open(tmp_path / "output.png") as picture:
        assert picture.size == (32, 48) and np.asarray(picture).std() > 5
    assert "\x1b[" not in done.stderr  # no colours where there is no terminal


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        (["--model-dir=nowhere"], "nowhere: is not a folder"),
        (["--width=70"], "--width 70 must be a multiple of 16: 64 is the nearest"),
        (["--steps=0"], "--steps 0 must be at least 1"),
        (["--output=picture.bmp"], "picture.bmp: unknown picture format"),
        (["--lora=missing.safetensors"], "missing.safetensors: cannot be opened"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_1(
    argv: list[str], fact: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = [f"--model-dir={model}", "--prompt=x", "--width=32", "--height=32", "--steps=1", "--backend=numpy"]
    assert main(["generate", *defaults, *argv]) == 1
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: ") and fact in last_line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out.png"), "out.png: the disk is full: make room and start"),
        (OSError(errno.EIO, "Input/output error", "in.png"), "in.png: Input/output error"),
        (OSError(errno.EIO, "Input/output error"), "file system: Input/output error"),
        (MemoryError("8 GB"), "this machine has no memory left: 8 GB: take a smaller size"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "a text or a path is not valid Unicode"),
    ],
    ids=["full disk", "broken disk", "no name", "no memory", "no Unicode"],
)
def test_an_error_of_the_system_is_one_line_and_exit_code_1(
    error: Exception, fact: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(app, "load", lambda command: SimpleNamespace(run=fail))
    assert main(["demo"]) == 1
    text = capfd.readouterr().err
    assert text.startswith(f"error: {fact}") and text.count("\n") == 1


def test_a_command_line_that_does_not_parse_is_exit_code_2() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--steps", "many"])
    assert stop.value.code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    expected = {
        "train": "--model-dir", "generate": "--model-dir", "demo": "--output",
        "compare": "--output", "serve": "--port", "doctor": "--quick",
        "completions": "fish",
    }  # fmt: skip
    assert expected.get(command, "--input") in text


def test_train_has_the_original_options_and_defaults() -> None:
    config = TrainConfig(Path("m"), Path("d"))
    original = {
        "output": Path("lora_weights.safetensors"), "rank": 16, "alpha": 16.0, "epochs": 100, "resolution": (256,),
        "save_every": 0, "seed": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in original} == original
    assert training_config.LR == 1e-4  # which --lr 0 means for Z-Image


def test_convert_goes_to_npz_and_back_and_casts(model: Path, tmp_path: Path) -> None:
    def convert(*argv: object) -> int:
        return main(["convert", "--model-type", "transformer", *map(str, argv)])

    source = model / "transformer" / "diffusion_pytorch_model.safetensors"
    there, back, half = tmp_path / "t.npz", tmp_path / "t.safetensors", tmp_path / "half.npz"
    assert convert("--input", source, "--output", there) == 0
    assert convert("--input", there, "--output", back) == 0
    assert convert("--input", source, "--output", half, "--dtype", "f16") == 0
    originals = safetensors.read(source)[0]
    for tensors, dtype in ((safetensors.read(back)[0], np.float32), (npz.read(half)[0], np.float16)):
        assert tensors.keys() == originals.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(tensor.read(), originals[name].read().astype(dtype))


def test_convert_refuses_what_it_cannot_do(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    existing = tmp_path / "existing.npz"
    existing.write_bytes(b"precious")
    source = model / "vae"
    for argv, fact in (
        (["--output", str(existing), "--model-type=vae"], "exists"),
        (["--output", str(tmp_path / "x.bin"), "--model-type=vae"], "x.bin"),
        (["--output", str(tmp_path / "x.npz"), "--model-type=transformer"], "vae"),
    ):
        assert main(["convert", "--input", str(source), *argv]) == 1
        assert fact in capfd.readouterr().err
    assert existing.read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 1


def test_inspect_lists_tensors_and_dtypes(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--input", str(model / "vae"), "--limit", "3"]) == 0
    text = capfd.readouterr().out
    assert "encoder.conv_in.weight" in text and "f32" in text
    assert text.count("│ f32") >= 3 and "decoder.up_blocks.3" not in text  # only the first three are listed
