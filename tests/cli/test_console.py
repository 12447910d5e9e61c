"""What a terminal shows: results above the bars, text as it is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import rich.console

from zimage_cli.app import main
from zimage_cli.terminal.console import THEME, Console


def terminal() -> tuple[Console, io.StringIO]:
    """A console whose two streams are one terminal, and everything that was written to it."""
    screen = io.StringIO()
    out, err = (
        rich.console.Console(file=screen, force_terminal=True, theme=THEME, width=80, emoji=False) for _ in range(2)
    )
    return Console(out, err), screen


def shown(written: str) -> list[str]:
    """The lines of an endless screen after the control codes in `written`: cursor up, erase line, return."""
    lines, row, column = [""], 0, 0
    rest = written
    while rest:
        if rest.startswith("\x1b["):
            end = next(i for i, c in enumerate(rest) if i > 1 and c.isalpha())
            count, code, rest = rest[2:end], rest[end], rest[end + 1 :]
            if code == "A":
                row -= int(count or 1)
            elif code == "K":
                lines[row] = ""
            continue
        char, rest = rest[0], rest[1:]
        if char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif char == "\r":
            column = 0
        else:
            lines[row] = lines[row].ljust(column)[:column] + char + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_a_result_stays_on_the_screen_while_bars_move() -> None:
    console, screen = terminal()
    with console.progress() as bars:
        for done in range(1, 4):
            bars.update("denoise", done, 3)
            bars.update("decode", done, 3)
            console.wrote(f"fox-{done}.png")
    lines = shown(screen.getvalue())
    assert lines[:3] == ["fox-1.png", "fox-2.png", "fox-3.png"]
    assert [line.split()[0] for line in lines[3:] if line] == ["denoise", "decode"]


def test_a_result_goes_to_stdout_where_that_is_no_terminal() -> None:
    _, screen = terminal()
    pipe = io.StringIO()
    console = Console(
        rich.console.Console(file=pipe, theme=THEME),
        rich.console.Console(file=screen, theme=THEME, force_terminal=True),
    )
    with console.progress() as bars:
        bars.update("decode", 1, 1)
        console.wrote("fox.png")
    assert pipe.getvalue() == "fox.png\n"


def test_no_line_is_lost_to_bars_that_never_appeared() -> None:
    console, screen = terminal()
    with console.progress():
        pass
    console.error("nothing was there")
    assert shown(screen.getvalue()) == ["error: nothing was there", ""]


def test_names_are_shown_as_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "fox:abc:[bold]x.safetensors"
    assert main(["inspect", "--input", str(tmp_path / name)]) == 1
    assert capfd.readouterr().err == f"error: {tmp_path / name}: there is no such file or folder\n"
    console, screen = terminal()
    console.facts(name, {"LoRA": name})
    console.table(("file",), [(name,)], title=name)
    assert screen.getvalue().count(name) == 4
