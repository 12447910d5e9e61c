"""Writes the tables of options and of folders into the pages: python docs/tables.py [--check]

A page asks for a table by a pair of comments, and says which options of which command it wants:

    <!-- options: train: rank alpha -->
    <!-- end of options -->

or all of a group: <!-- options: train: group: Saving -->

Groups, defaults and help texts are those that `zimage COMMAND --help-all` shows. Between `<!-- rooms -->` and
`<!-- end of rooms -->` a page gets the docstrings of the folders, between `<!-- chips -->` and `<!-- end of chips -->`
predicted times by chip. With --check nothing is written: the exit code is 1 if a page is out of date.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from chips import CHIPS, times

from zimage_cli.commands import root_parser
from zimage_cli.terminal.parser import OptionInfo

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "zimage_mlx", "zimage_ref", "zimage_serve")
_OPTIONS = re.compile(r"(<!-- options: (\w+): ([\w :-]+?) -->\n)(.*?)(<!-- end of options -->)", re.DOTALL)
_ROOMS = re.compile(r"(<!-- rooms -->\n)(.*?)(<!-- end of rooms -->)", re.DOTALL)
_CHIPS = re.compile(r"(<!-- chips -->\n)(.*?)(<!-- end of chips -->)", re.DOTALL)
_GROUP = "group: "


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def updated(text: str) -> str:
    """A page's text with every table made anew."""
    text = _OPTIONS.sub(
        lambda found: f"{found[1]}\n{option_table(found[2], names_of(found[2], found[3]))}\n{found[5]}", text
    )
    text = _CHIPS.sub(lambda found: f"{found[1]}\n{chip_table()}\n{found[3]}", text)
    return _ROOMS.sub(lambda found: f"{found[1]}\n{room_table()}\n{found[3]}", text)


def named_options(text: str) -> Iterator[tuple[str, str]]:
    """Command and option of every row that a page asks for."""
    for found in _OPTIONS.finditer(text):
        yield from ((found[2], name) for name in names_of(found[2], found[3]))


def options_of(command: str) -> dict[str, OptionInfo]:
    """What there is to say of every option of a command, by the option's name."""
    parser = root_parser([command]).commands[command]
    infos = map(parser.info, parser.arguments)
    return {info.flag.removeprefix("--").replace("-", "_"): info for info in infos}


def names_of(command: str, wanted: str) -> list[str]:
    """The options that a page asks for: their names, or all options of a group, the most used ones first."""
    if not wanted.startswith(_GROUP):
        return wanted.split()
    title = wanted.removeprefix(_GROUP)
    group = {name: info for name, info in options_of(command).items() if info.group and info.group.value == title}
    if not group:
        raise KeyError(f"{command} has no group {title!r}")
    return sorted(group, key=lambda name: not group[name].essential)


def option_table(command: str, names: list[str]) -> str:
    """A table of the options `names` of a command. Raises KeyError for one that it does not have."""
    known = options_of(command)
    rows = [known[name] for name in names]
    lines = [f"| `{info.flag}` | {_cell(_default(info))} | {_cell(info.meaning)} |" for info in rows]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *lines])


def _default(info: OptionInfo) -> str:
    """The default, in words that are true on every computer."""
    return "mlx if it is installed" if info.flag == "--backend" else info.default


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def room_table() -> str:
    """A table of every folder: what it knows, and what it may import."""
    lines = ["| folder | knows | may import |", "|---|---|---|"]
    for package in PACKAGES:
        for init in sorted((ROOT / package).glob("*/__init__.py")):
            doc = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
            cells = [_cell(line.partition(": ")[2].rstrip(".")) for line in doc.split("\n")[:2]]
            lines.append(f"| `{package}/{init.parent.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def chip_table() -> str:
    """A table of predictions by chip: seconds, GB/s of the disk, and the share of products."""
    work = "forward 512 | forward 1024 | step fast 512 | step lean 512 | step lean 1024 | encode 512 | decode 1024"
    heads = f"chip | TFLOP/s, GB/s | {work} | picture 1024 | disk GB/s | products"
    lines = [f"| {heads} |", "|---|--:" + "|--:" * (heads.count("|") - 1) + "|"]
    for found in map(times, CHIPS):
        chip = found.chip
        seconds = (
            found.forward_512, found.forward_1024, found.step_fast_512, found.step_lean_512, found.step_lean_1024,
            found.encode_512, found.decode_1024, found.picture_1024,
        )  # fmt: skip
        cells = [chip.name, f"{chip.peak:.1f}, {chip.bandwidth:g}", *map(_seconds, seconds)]
        cells += [f"{found.read_1024 / 1e9:.1f}", f"{found.products:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def main() -> int:
    """Updates every page, or says which ones are out of date."""
    check = "--check" in sys.argv[1:]
    stale = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := updated(text)) != text:
            stale += 1
            sys.stdout.write(f"{page.relative_to(ROOT)}: {'out of date' if check else 'written'}\n")
            if not check:
                page.write_text(new, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
