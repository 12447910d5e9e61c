"""What comes from a file reaches the terminal printable, and what cannot be shown never ends the work."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from support.daily import daily

import zimage_ref
from zimage_cli.app import main
from zimage_cli.commands import interactive
from zimage_cli.terminal.streams import Shown
from zimage_ref.errors import printable
from zimage_ref.pictures.images import save_picture

ESCAPE = "\x1b]0;PWNED\x07\x1b[2J\u202e"
RECORD = {"prompt": "x", "width": 64, "height": 64, "steps": 1, "guidance": 0, "seed": 3, "model": "tiny", "loras": []}
SMALL = ["--model-dir=tiny", "--width=64", "--height=64", "--steps=1", "--backend=numpy"]
TOKENIZER = Path(zimage_ref.__file__).with_name("tiny") / "weights" / "tokenizer" / "tokenizer.json"


def picture(path: Path, **record: object) -> Path:
    save_picture(Image.new("RGB", (32, 32)), path, RECORD | record)
    return path


def test_printable_keeps_text_and_escapes_control() -> None:
    assert printable("fox 狐 é\u3000\u00a0👨\u200d👩\n\tx") == "fox 狐 é\u3000\u00a0👨\u200d👩\n\tx"
    assert printable("\x1b[2J\x9b\u202e\r\udcff\0") == "\\x1b[2J\\x9b\\u202e\\r\\udcff\\x00"


def test_no_escape_of_a_file_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file({"a" + ESCAPE: np.zeros(2, "f4")}, tmp_path / "name.safetensors")
    save_file({"a": np.zeros(2, "f4")}, tmp_path / "metadata.safetensors", metadata={"k" + ESCAPE: ESCAPE})
    np.savez(tmp_path / "name.npz", **{"a" + ESCAPE: np.zeros(2, "f4")})
    files = [*tmp_path.iterdir()]
    files += [picture(tmp_path / "p.png", prompt=ESCAPE), picture(tmp_path / "p.jpg", sampler=ESCAPE)]
    odd = tmp_path / f"m{ESCAPE.replace('/', '')}"
    odd.mkdir()
    runs = [["inspect", f"--input={file}"] for file in files]
    runs += [["generate", f"--from-image={tmp_path / 'p.png'}", f"--output={tmp_path}/{ESCAPE}.png"]]
    runs += [["generate", f"--from-image={tmp_path / 'p.jpg'}"], ["inspect", f"--input={odd}"]]
    for argv in runs:
        main(argv)
        shown = "".join(capfd.readouterr())
        assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown, argv
    assert "PWNED" in shown


@pytest.mark.parametrize("text", ["a\0b", "\ud800"], ids=["NUL", "surrogate"])
def test_a_record_with_impossible_texts_is_one_line(
    text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for field in ("init_image", "mask", "backend", "model", "vae", "sampler", "loras"):
        value: object = [{"file": text, "scale": 1, "sha256": ""}] if field == "loras" else text
        path = picture(tmp_path / "p.png", **{field: value})
        assert main(["generate", f"--from-image={path}", f"--output={tmp_path}/o.png"]) == 1
        error = capfd.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, (field, error)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.toml", b"a = " + b"[" * 5000), ("digits.toml", b"rank = " + b"1" * 5000),
        ("latin.toml", b"trigger = '\xe9'"), ("nul.toml", b'dataset = "a\\u0000b"'),
        ("deep.json", b'{"a":' * 50_000), ("digits.json", b'{"rank": ' + b"1" * 5000 + b"}"),
        ("surrogate.json", b'{"trigger": "\\ud800"}'), ("nul.json", b'{"cache": "a\\u0000b"}'),
    ],
)  # fmt: skip
def test_an_odd_config_file_is_one_line(
    name: str, content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["train", f"--config={tmp_path / name}"]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: {tmp_path / name}: ") and error.count("\n") == 1


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a panic at load": lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a pattern that gives up": lambda d: d.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    ),
    "no unknown token": lambda d: d.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}),
    "pieces of no length": lambda d: d.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_one_line(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    DAMAGES[damage](data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    prompt = "a" * 40 + "! x"
    argv = ["generate", *SMALL, f"--prompt={prompt}", f"--tokenizer={tmp_path / 'tokenizer.json'}"]
    assert main([*argv, f"--output={tmp_path}/o.png"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'tokenizer.json'}: ") and error.count("\n") == 1


class Full(io.StringIO):
    """A stream that cannot be written."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_stream_that_cannot_be_written_is_warned_of_once() -> None:
    warned = io.StringIO()
    shown = Shown(Full(), warned)
    for _ in range(3):
        assert shown.write("x") == 1
    assert warned.getvalue().count("warning: output cannot be shown") == 1


def started(argv: list[str], how: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command in a shell, with `how` after it, such as >&- for a closed stdout."""
    code = "import sys; from zimage_cli.app import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, *argv]
    return subprocess.run(["sh", "-c", f'"$@" {how}', "sh", *words], capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize(
    "how", daily([">&-", "2>&-", ">/dev/full", "2>/dev/full", "| head -c 1"], ">&-", "2>/dev/full", "| head -c 1")
)
def test_a_picture_is_made_without_a_place_to_show_it(how: str, tmp_path: Path) -> None:
    run = started(["generate", *SMALL, "--prompt=x", "--count=2", f"--output={tmp_path}/{{index}}.png"], how)
    assert run.returncode == 0 and b"Traceback" not in run.stderr, run.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.png", "2.png"]
    assert (b"warning: output cannot be shown: " in run.stderr) == (how == ">/dev/full")


def test_a_narrow_terminal_shows_escapes(tmp_path: Path) -> None:
    path = picture(tmp_path / "p.png", prompt="狐")
    run = started(["inspect", f"--input={path}"], "", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert run.returncode == 0 and rb"\u72d0" in run.stdout and run.stderr == b""


def test_interactive_goes_on_after_what_one_request_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults: list[BaseException] = [
        OSError(errno.ENOSPC, "No space left on device"), MemoryError("no room"), KeyboardInterrupt(),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), OSError(errno.EIO, "Input/output error"),
    ]  # fmt: skip
    lines = iter([*["x"] * len(faults), "/steps 1000000000000", "/seed nan", "/lora \0", "/size 9x", "y", "/show"])
    monkeypatch.setattr("zimage_cli.terminal.console.Console.ask", lambda self, prompt: next(lines, "/quit"))
    real = interactive.PictureWriter.make

    def make(self: Any, *args: Any) -> None:
        if faults:
            raise faults.pop(0)
        real(self, *args)

    monkeypatch.setattr(interactive.PictureWriter, "make", make)
    assert main(["generate", *SMALL, "--interactive", f"--output={tmp_path}/o.png"]) == 0
    error = capsys.readouterr().err
    for fact in (
        "No space left",
        "no room",
        "stopped",
        "surrogates not",
        "Input/output",
        "--steps 1000",
        "/seed",
        "next",
    ):
        assert fact in error, (fact, error)
    assert [file.name for file in tmp_path.iterdir()] == ["o.png"]
