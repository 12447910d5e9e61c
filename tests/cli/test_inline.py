"""Pictures in terminals that show them: bytes of the protocols, and who is given them."""

from __future__ import annotations

import base64
import io
import re
import unicodedata

import numpy as np
import pytest
import rich.console
from PIL import Image
from rich.cells import cell_len

from zimage_cli.terminal import inline
from zimage_cli.terminal.console import Console
from zimage_cli.terminal.pictures import lines_of, show


def shown(monkeypatch: pytest.MonkeyPatch, picture: Image.Image, columns: int, colours: str = "truecolor",
          **environ: str) -> str:  # fmt: skip
    """All that `show` writes to a terminal."""
    for name in ("TERM", "TERM_PROGRAM", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    show(picture, Console(err=rich.console.Console(file=file, force_terminal=True, color_system=colours, width=99)),
         columns)  # fmt: skip
    return file.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 120, 3), np.uint8))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TERM": "xterm-kitty"}, inline.KITTY),
        ({"TERM": "xterm-ghostty"}, inline.KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, inline.KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, inline.ITERM2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, inline.ITERM2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, ""),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, ""),
        ({"TERM": "screen-256color", "TERM_PROGRAM": "iTerm.app"}, ""),
        ({}, ""),
    ],
)
def test_terminals_are_known_by_their_environment(environ: dict[str, str], expected: str) -> None:
    assert inline.protocol(environ) == expected


def test_kitty_is_given_the_picture_and_cells_that_stand_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, NOISE, 20, TERM="xterm-kitty")
    commands = re.findall("\x1b_G(.*?);(.*?)\x1b\\\\", text)
    assert len(commands) > 2 and all(len(data) <= 4096 for _, data in commands)
    assert [keys[-3:] for keys, _ in commands] == ["m=1"] * (len(commands) - 1) + ["m=0"]
    number = int(re.search("i=([0-9]+),c=20,r=5,", commands[0][0])[1])  # type: ignore[index]
    picture = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in commands))))
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(NOISE))
    lines = [line for line in text.split("\n") if "\U0010eeee" in line]
    assert len(lines) == 5 and all(line.count("\U0010eeee") == 20 for line in lines)
    assert all(f"38;2;{number >> 16 & 255};{number >> 8 & 255};{number & 255}m" in line for line in lines)
    assert len({re.search("\U0010eeee(.)", line)[1] for line in lines}) == 5  # type: ignore[index]
    assert "▀" not in text


def test_the_cells_of_kitty_are_as_wide_as_the_picture() -> None:
    for line in inline.kitty_lines(7, inline.MOST_LINES):
        assert cell_len(line) == 7
        assert all(unicodedata.combining(mark) == 230 for mark in line.replace("\U0010eeee", ""))
    assert len(set(inline.kitty_lines(7, 99))) == inline.MOST_LINES == 48


def test_a_preview_takes_the_place_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.delenv("TMUX", raising=False)
    file = io.StringIO()
    console = Console(err=rich.console.Console(file=file, force_terminal=True, color_system="truecolor"))
    first, second = (lines_of(NOISE, console, 8, 5) for _ in range(2))
    assert first == second and len(re.findall("i=5,c=8,r=2,", file.getvalue())) == 2


def test_iterm_is_given_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, NOISE, 5, TERM="xterm-256color", TERM_PROGRAM="iTerm.app")
    found = re.fullmatch("\x1b]1337;File=inline=1;size=([0-9]+);width=5;preserveAspectRatio=1:(.*)\x07\n", text)
    assert found
    data = base64.b64decode(found[2])
    assert len(data) == int(found[1]) and Image.open(io.BytesIO(data)).size == (60, 30)  # 12 pixels a cell


def test_others_get_half_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tall = Image.new("RGB", (10, 600), "red")  # more lines than kitty has marks for
    for text in (
        shown(monkeypatch, NOISE, 5, TERM="xterm-kitty", TMUX="1"),
        shown(monkeypatch, NOISE, 5, "256", TERM="xterm-kitty"),
        shown(monkeypatch, tall, 5, TERM="xterm-kitty"),
    ):
        assert "▀" in text and "\x1b_G" not in text
