"""`zimage generate` as its users meet it: many pictures, file names, stdin and stdout, previews, interactive use."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import rich.console
from PIL import Image
from support import tiny

import zimage_cli.commands.interactive
import zimage_cli.terminal.pictures
from zimage_cli.app import main
from zimage_cli.terminal.console import Console
from zimage_cli.terminal.pictures import show
from zimage_ref import ZImagePipeline
from zimage_ref.generation.pipeline import Pipeline
from zimage_ref.model.config import SchedulerConfig
from zimage_ref.networks.weights import Weights
from zimage_ref.pictures.metadata import read_record

FAST = ["--backend=numpy", "--width=32", "--height=32", "--steps=1"]


@pytest.fixture
def run(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `zimage generate` in an empty folder; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: main(["generate", f"--model-dir={model_dir}", *FAST, *map(str, argv)])


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a weight is read."""

    def read(self: Weights, name: str, *indices: object) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Weights, "__getitem__", read)
    monkeypatch.setattr(Weights, "rows", read)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.int16)


def test_every_prompt_is_made_with_every_seed_and_named_for_it(run, tmp_path: Path) -> None:
    prompts = ["--prompt=A fox, in (deep) snow!", "--prompt=waves"]
    assert run(*prompts, "--seed=5", "--seed=9", "--count=2", "--output={prompt}_{seed}.png", "--batch-size=3") == 0
    fox, waves = ([f"{words}_{seed}.png" for seed in (10, 5, 6, 9)] for words in ("A-fox-in-deep-snow", "waves"))
    assert names(tmp_path) == sorted(fox + waves)
    assert read_record(tmp_path / "waves_10.png")["seed"] == 10
    assert run("--prompt=waves", "--seed=10", "--output=alone.png") == 0
    assert np.abs(pixels(tmp_path / "alone.png") - pixels(tmp_path / "waves_10.png")).max() <= 1


def test_pictures_that_a_name_does_not_tell_apart_are_numbered(run, tmp_path: Path) -> None:
    assert run("--prompt=x", "--count=3", "--output=made/picture.webp") == 0
    assert names(tmp_path / "made") == ["picture-1.webp", "picture-2.webp", "picture-3.webp"]
    assert run("--prompt=x", "--count=2", "--output={index}.jpg") == 0
    assert names(tmp_path) == ["1.jpg", "2.jpg", "made"]


def test_a_picture_is_overwritten_only_when_asked(run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "output.png").write_bytes(b"precious")
    assert run("--prompt=x") == 1
    assert "output.png: exists: give --overwrite" in capfd.readouterr().err
    assert (tmp_path / "output.png").read_bytes() == b"precious"
    assert run("--prompt=x", "--overwrite") == 0
    assert pixels(tmp_path / "output.png").shape == (32, 32, 3)


def test_prompts_come_from_a_file_and_from_stdin(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa fox\n\n  soft waves \n", encoding="utf-8")
    assert run("--prompt=first", "--prompt-file=prompts.txt", "--output={index}-{prompt}.png") == 0
    assert names(tmp_path) == ["1-first.png", "2-a-fox.png", "3-soft-waves.png", "prompts.txt"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin\n"))
    assert run("--prompt-file=-", "--output={prompt}.png") == 0
    assert (tmp_path / "from-stdin.png").exists()


def test_a_dash_writes_the_png_alone_to_stdout(run, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run("--prompt=x", "--output=-") == 0
    out = capfdbinary.readouterr().out
    assert run("--prompt=x", "--output=x.png") == 0
    assert out == (tmp_path / "x.png").read_bytes() and names(tmp_path) == ["x.png"]


def test_a_prompt_that_is_cut_is_told(run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt=" + "snow " * 600, "--prompt=short") == 0
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "cut after 512 of " in warnings[0] and "snow snow" in warnings[0]


def test_previews_show_the_picture_under_way(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    save = zimage_cli.terminal.pictures.save_picture

    def watched(picture: Image.Image, path: Path, *record: object) -> None:
        save(picture, path, *record)
        if "preview" in path.name:
            seen.append(pixels(path))

    monkeypatch.setattr(zimage_cli.terminal.pictures, "save_picture", watched)
    assert run("--prompt=x", "--prompt=y", "--steps=5", "--preview-steps=2", "--output={prompt}.png") == 0
    assert names(tmp_path) == ["x.png", "x.preview.png", "y.png", "y.preview.png"]
    assert len(seen) == 4  # after steps 2 and 4 of each
    early, late, final = (*seen[:2], pixels(tmp_path / "x.png"))
    assert early.shape == late.shape == final.shape
    assert (early != late).any() and (late != final).any()


def test_each_picture_of_a_batch_has_its_own_preview(run, tmp_path: Path) -> None:
    argv = ["--prompt=x", "--seed=1", "--seed=2", "--steps=4", "--preview-steps=3", "--output={seed}.png"]
    assert run(*argv, "--batch-size=2") == 0
    assert names(tmp_path) == ["1.png", "1.preview.png", "2.png", "2.preview.png"]

    assert run(*argv[:1], "--seed=2", *argv[3:-1], "--output=alone.png") == 0
    first, second, alone = (pixels(tmp_path / f"{name}.preview.png") for name in ("1", "2", "alone"))
    assert np.abs(second - alone).max() <= 1 and np.abs(first - alone).mean() > 10


def test_a_picture_and_a_mask_change_what_is_made(run, tmp_path: Path) -> None:
    photo = tiny.photograph(60, 44, 1)
    photo.save("in.jpg")
    mask = np.zeros((44, 60), np.uint8)
    mask[:, 30:] = 255
    Image.fromarray(mask).save("mask.png")
    argv = ["generate", f"--model-dir={tmp_path}", "--backend=numpy", "--steps=4", "--prompt=x", "--init-image=in.jpg"]
    tiny.write_model_folder(tmp_path)
    assert main([*argv, "--width=auto", "--mask=mask.png", "--output=painted.png", "--fit=stretch"]) == 0
    assert main([*argv, "--strength=0.5", "--output=changed.png"]) == 0
    painted = pixels(tmp_path / "painted.png")
    kept = np.asarray(Image.open("in.jpg").resize((64, 48), Image.Resampling.LANCZOS), np.int16)
    assert painted.shape == pixels(tmp_path / "changed.png").shape == (48, 64, 3)
    np.testing.assert_array_equal(painted[:, :31], kept[:, :31])
    assert (painted[:, 33:] != kept[:, 33:]).any(axis=2).mean() > 0.9


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        (["--prompt=x", "--width=100"], "--width 100 must be a multiple of 16: 96 is the nearest"),
        (["--prompt=x", "--strength=0.5"], "--strength needs --init-image"),
        (["--prompt=x", "--fit=pad"], "--fit needs --init-image"),
        (["--prompt=x", "--init-image=missing.png"], "missing.png: cannot be read as a picture: No such file or"),
        (["--prompt=x", "--output=text.png/x.png"], "text.png/x.png: cannot be written: "),
        (["--prompt=x", "--init-image=text.png"], "text.png: cannot be read as a picture"),
        (
            ["--prompt=x", "--init-image=small.png", "--mask=large.png"],
            "large.png is 24 x 24, --init-image small.png 16 x 16",
        ),
        (["--prompt=x", "--negative-prompt=y"], "--negative-prompt does nothing without guidance"),
        (["--prompt=x", "--cfg-truncation=0.5"], "--cfg-truncation does nothing without guidance"),
        (["--prompt=x", "--count=2", "--output=-"], "--output - takes one picture, not 2"),
        (["--prompt=x", "--output={size}.png"], "{size} is unknown: known are {seed}, {index}, {prompt}"),
        (["--prompt=x", "--count=0"], "--count 0 must be at least 1"),
        (["--prompt=x", "--batch-size=0"], "--batch-size 0 must be at least 1"),
        (["--prompt-file=missing.txt"], "missing.txt: cannot be read"),
        (["--prompt-file=empty.txt"], "empty.txt: holds no prompts"),
        (["--prompt=x", "--lora=missing.safetensors:0.5"], "missing.safetensors"),
        (["--from-image=missing.png"], "missing.png: cannot be read as a picture"),
        (["--from-image=small.png"], "small.png: does not say how it was made"),
        (["--interactive", "--prompt=x"], "--interactive reads prompts"),
        ([], "--prompt or --prompt-file must be given"),
    ],
    ids=lambda value: value[-1].lstrip("-") if isinstance(value, list) and value else "",
)
def test_what_is_wrong_is_one_line_before_any_weights_are_read(
    argv: list[str], fact: str, run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    tiny.photograph(16, 16, 1).save(tmp_path / "small.png")
    tiny.photograph(24, 24, 1).save(tmp_path / "large.png")
    before = names(tmp_path)
    assert run(*argv) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and fact in error
    assert names(tmp_path) == before


@pytest.mark.usefixtures("no_weights")
def test_what_does_not_fit_into_memory_is_refused_unless_forced(
    run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ZImagePipeline, "memory_limit", lambda self: 1000)
    assert run("--prompt=x") == 1
    error = capfd.readouterr().err
    assert "there are 0.0 GB" in error and "--force tries it" in error and error.count("\n") == 1
    with pytest.raises(AssertionError, match="was read"):
        run("--prompt=x", "--force")


def test_engine_precision_and_parts_are_recorded_and_used_again(run, model_dir: Path, tmp_path: Path) -> None:
    other = tiny.write_model_folder(tmp_path / "other", dtype="f16") / "transformer"
    options = ["--prompt=x", "--dtype=float64", f"--transformer={other}", "--output=first.png"]
    assert run(*options) == 0 and run("--prompt=x", "--output=plain.png") == 0
    made = read_record(tmp_path / "first.png")
    assert (made["backend"], made["dtype"], made["transformer"]) == ("numpy", "float64", str(other))
    assert main(["generate", "--from-image=first.png", "--output=again.png"]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    assert read_record(tmp_path / "plain.png")["model_fingerprint"] != made["model_fingerprint"]


def test_the_base_model_has_its_own_defaults(tmp_path: Path) -> None:
    model = tiny.write_model_folder(tmp_path / "base", scheduler=SchedulerConfig(shift=6.0))
    argv = ["generate", f"--model-dir={model}", "--backend=numpy", "--width=32", "--height=32", "--prompt=x"]
    assert main([*argv, "--steps=2", f"--output={tmp_path}/base.png"]) == 0
    made = read_record(tmp_path / "base.png")
    assert made["guidance"] == 4.0 and made["steps"] == 2


def test_interactive_use_keeps_the_model_and_what_was_set(
    run, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn = iter([11, 12, 13])
    monkeypatch.setattr(zimage_cli.commands.interactive, "random_seed", lambda: next(drawn))
    lines = [
        "a fox", "/size 48x32", "/seed 7", "/steps two", "/nonsense", "waves", "/show", "/seed",
        "/lora none.safetensors:0.5", "/guidance 2", "/negative-prompt soft", "last", "/negative-prompt", "bare",
        "/help", "/quit", "never read",
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert run("--interactive", "--output=picture.png") == 0
    assert names(tmp_path) == ["picture-2.png", "picture-3.png", "picture-4.png", "picture.png"]
    first, second, third, bare = (read_record(tmp_path / f"picture{n}.png") for n in ("", "-2", "-3", "-4"))
    assert (first["prompt"], first["width"], first["seed"]) == ("a fox", 32, 11)
    assert (second["prompt"], second["width"], second["height"], second["seed"]) == ("waves", 48, 32, 7)
    assert (third["prompt"], third["seed"], third["guidance"], third["negative_prompt"]) == ("last", 12, 2.0, "soft")
    assert (bare["guidance"], bare["negative_prompt"]) == (2.0, first["negative_prompt"])  # no value: the default
    err = capfd.readouterr().err
    for fact in ("/steps: 'two' is not a whole number", "/nonsense is unknown", "none.safetensors", "/size 1024x768"):
        assert fact in err
    assert err.count("error: ") == 3


@pytest.mark.parametrize(
    ("options", "limit", "lean"),
    [
        ([], None, True), (["--memory=fast"], None, False),
        (["--interactive"], None, False), (["--interactive"], 1, True), (["--interactive", "--memory=fast"], 1, False),
    ],
)  # fmt: skip
def test_networks_stay_in_memory_where_they_are_used_again_and_fit(
    options: list[str], limit: int | None, lean: bool, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(ZImagePipeline, "memory_limit", lambda self: limit)
    monkeypatch.setattr(Pipeline, "generate", lambda self, *args, **how: seen.append(self.lean) or iter(()))
    monkeypatch.setattr("sys.stdin", io.StringIO("a fox\n"))
    assert run("--force", *options, *([] if "--interactive" in options else ["--prompt=x"])) == 0
    assert seen == [lean]


def test_an_interrupted_picture_does_not_end_interactive_use(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, calls = ZImagePipeline.predict, iter(range(100))

    def predict(*args, **options):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(ZImagePipeline, "predict", predict)
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\nthird\n"))
    assert run("--interactive", "--output={prompt}.png") == 0
    assert names(tmp_path) == ["first.png", "third.png"]
    assert "stopped" in capfd.readouterr().err


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal in which the tests run may be able to show pictures."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("TERM_PROGRAM", "TMUX"):
        monkeypatch.delenv(name, raising=False)


def test_the_terminal_shows_a_thumbnail() -> None:
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste((0, 0, 255), (0, 10, 40, 20))
    terminal = io.StringIO()
    colours = rich.console.Console(file=terminal, force_terminal=True, color_system="truecolor", width=80)
    show(picture, Console(err=colours), 8)
    lines = terminal.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 2 and all(line.count("▀") == 8 for line in lines)
    assert "38;2;255;0;0;48;2;255;0;0" in lines[0] and "38;2;0;0;255;48;2;0;0;255" in lines[1]
    pipe = io.StringIO()
    show(picture, Console(err=rich.console.Console(file=pipe)), 8)
    assert pipe.getvalue() == ""
