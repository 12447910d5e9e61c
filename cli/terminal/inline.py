"""Pictures in a terminal that can show them: the protocols of kitty and of iTerm2, as text to write.

kitty is given a picture once, under a number. Then cells of text stand for it: such cells can be moved and redrawn like
any others. Their colour is the number, and a mark over the first cell of a line says which line of the picture it is.
Sources: "Unicode placeholders" of kitty's graphics protocol, with its rowcolumn-diacritics.txt; iTerm2, inline images.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping

KITTY, ITERM2 = "kitty", "iterm2"
_KITTY = ("kitty", "ghostty")  # in TERM or TERM_PROGRAM
_ITERM2 = ("iTerm.app", "WezTerm")  # TERM_PROGRAM
_CELL = "\U0010eeee"
_MARKS = (
    "\u0305\u030d\u030e\u0310\u0312\u033d\u033e\u033f\u0346\u034a\u034b\u034c\u0350\u0351\u0352\u0357\u035b\u0363\u0364"
    "\u0365\u0366\u0367\u0368\u0369\u036a\u036b\u036c\u036d\u036e\u036f\u0483\u0484\u0485\u0486\u0487\u0592\u0593\u0594"
    "\u0595\u0597\u0598\u0599\u059c\u059d\u059e\u059f\u05a0\u05a1"
)
MOST_LINES = len(_MARKS)
_CHUNK = 4096  # characters in one command of kitty


def protocol(environ: Mapping[str, str]) -> str:
    """KITTY, ITERM2, or "" if the terminal shows text only. tmux and screen pass no pictures on."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if "TMUX" in environ or term.startswith(("tmux", "screen")):
        return ""
    if program in _ITERM2:
        return ITERM2
    return KITTY if any(name in term or name == program for name in _KITTY) else ""


def kitty(png: bytes, number: int, columns: int, lines: int) -> str:
    """Gives kitty the picture `number`, in the place of an earlier one of that number, and the cells that it takes."""
    data = base64.standard_b64encode(png).decode()
    chunks = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
    keys = f"a=T,U=1,f=100,q=2,i={number},c={columns},r={lines},"
    return "".join(
        f"\x1b_G{'' if i else keys}m={int(i < len(chunks) - 1)};{chunk}\x1b\\" for i, chunk in enumerate(chunks)
    )


def kitty_lines(columns: int, lines: int) -> Iterator[str]:
    """The lines of cells that stand for a picture, at most MOST_LINES. Their colour says for which."""
    for mark in _MARKS[:lines]:  # the first cell is of column 0, each other one of the next column
        yield f"{_CELL}{mark}{_MARKS[0]}" + _CELL * (columns - 1)


def iterm2(png: bytes, columns: int) -> str:
    """Shows a picture, `columns` cells wide, on the lines from here on."""
    data = base64.standard_b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={columns};preserveAspectRatio=1:{data}\x07\n"
