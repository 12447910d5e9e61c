"""Writes the tables of options and of folders into the pages: python docs/tables.py [--check]

A page asks for a table by a pair of comments, and says which options of which command it wants:

    <!-- options: train: rank alpha -->
    <!-- end of options -->

Defaults and help texts come from the option classes, and from argparse for options that only the command line has. The
page docs/architecture.md takes what its folders know from their docstrings, between `<!-- rooms -->` and
`<!-- end of rooms -->`. With --check nothing is written: the exit code is 1 if a page is out of date.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

from zimage_cli.terminal.options import in_flags
from zimage_ref import GenerateConfig, TrainConfig

ROOT = Path(__file__).parents[1]
CONFIGS: dict[str, type] = {"generate": GenerateConfig, "train": TrainConfig}
COMMANDS = ("train", "generate", "convert", "inspect", "doctor", "demo")
PACKAGES = ("cli", "zimage_mlx", "zimage_ref")
_OPTIONS = re.compile(r"(<!-- options: (\w+): ([\w ]+?) -->\n)(.*?)(<!-- end of options -->)", re.DOTALL)
_ROOMS = re.compile(r"(<!-- rooms -->\n)(.*?)(<!-- end of rooms -->)", re.DOTALL)
_DEFAULT = re.compile(r" \(default(?: here)?: ([^()]*)\)$")  # at the end of a help text: it has its own column
_ENGINE = "mlx if it is installed"  # the help text names the one of this machine


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def updated(text: str) -> str:
    """A page's text with every table made anew."""
    text = _OPTIONS.sub(lambda found: f"{found[1]}\n{option_table(found[2], found[3].split())}\n{found[5]}", text)
    return _ROOMS.sub(lambda found: f"{found[1]}\n{room_table()}\n{found[3]}", text)


def named_options(text: str) -> Iterator[tuple[str, str]]:
    """Command and option of every row that a page asks for."""
    for found in _OPTIONS.finditer(text):
        yield from ((found[2], name) for name in found[3].split())


def options_of(command: str) -> dict[str, tuple[str, str, str]]:
    """Flag, default and help text of every option of a command, by the option's name."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"zimage_cli.commands.{command}").add_options(parser)
    config = {field.name: field for field in fields(CONFIGS[command])} if command in CONFIGS else {}
    found: dict[str, tuple[str, str, str]] = {}
    for action in parser._actions:
        if action.dest == "help":
            continue
        flag = action.option_strings[-1]
        name = flag.removeprefix("--").replace("-", "_")
        field = config.get(name)
        help = in_flags((action.help or "").replace("%%", "%"))
        default = action.default
        if action.required or (field and field.default is MISSING and default is argparse.SUPPRESS):
            shown = "required"
        elif "(default here: " in help:
            shown = _ENGINE
        elif field is None and (said := _DEFAULT.search(help)):
            shown = said[1]
        else:
            shown = _shown(default if field is None or field.default is MISSING else field.default, help)
        choices = f": {', '.join(map(str, action.choices))}" if action.choices else ""
        found[name] = flag, shown, _DEFAULT.sub("", help) + choices
    return found


def _shown(value: object, help: str) -> str:
    """A default as a person types it; nothing for an option that is off or empty by default."""
    if value is None or value is False or value in ("", ()) or value == []:
        return "auto" if re.search(r"\bauto\b", help) else ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def option_table(command: str, names: list[str]) -> str:
    """A table of the options `names` of a command. Raises KeyError for one that it does not have."""
    known = options_of(command)
    rows = [known[name] for name in names]
    lines = [f"| `{name}` | {_cell(default)} | {_cell(help)} |" for name, default, help in rows]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *lines])


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
