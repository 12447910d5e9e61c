"""Knows: the commands, one in each file: its options, and what it does with them.
May import: terminal, zimage_ref.
Must never know: mlx, numpy, and how anything is computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from importlib import import_module
from typing import Protocol, cast

from zimage_ref import __version__

from ..terminal.console import Console
from ..terminal.parser import CommandParser

# command, a module of this folder -> its text in `zimage --help`
COMMANDS = {
    "train": "Train a LoRA on a folder of pictures with captions.",
    "generate": "Make pictures from prompts.",
    "convert": "Write weights or LoRAs in another file format, naming or precision.",
    "inspect": "Show the contents of a weights file or a model folder, or how a picture was made.",
    "compare": "Show the differences between two pictures: in their options and in their pixels.",
    "serve": "Serve pictures and training to a browser, to programs and to agents.",
    "doctor": "Check and measure this machine, and predict how long pictures and training take.",
    "demo": "Teach a small built-in model a new word, from eight drawings.",
    "completions": "Print a script with which a shell completes commands and options.",
}
_FIRST_STEPS = (
    ("Try everything with a small model, without a download:", "zimage demo"),
    ("Make a picture:", 'zimage generate --model-dir Tongyi-MAI/Z-Image-Turbo --prompt "a red fox in snow"'),
    ("See how to train a LoRA:", "zimage train --help"),
)


class Command(Protocol):
    """The interface of a module in this folder that is a command."""

    def add_options(self, parser: CommandParser) -> None:
        """Adds the options of the command."""

    def run(self, args: argparse.Namespace, console: Console) -> int | None:
        """Runs the command with the parsed `args`. Returns the exit code; None means 0."""


def load(name: str) -> Command:
    """Imports the command `name`. Commands are imported on use, so that `zimage` starts fast."""
    return cast(Command, import_module(f".{name}", __package__))


def root_parser(words: Collection[str] = tuple(COMMANDS)) -> CommandParser:
    """A parser of the command line `words`. Only commands that are among the words get their options."""
    root = CommandParser("zimage", "Z-Image: train LoRAs, generate pictures, convert and inspect weights.")
    root.usage = "zimage COMMAND [options]"
    root.notes = "zimage COMMAND --help explains a command."
    root.examples = _FIRST_STEPS
    root.add_argument(
        "--version", action="version", version=f"zimage-mlx {__version__}", help="Show the version and stop."
    )
    commands = root.add_subparsers(
        prog="zimage", dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, prog=f"zimage {name}", help=summary, description=summary)
        root.commands[name] = command
        if name in words:
            load(name).add_options(command)
    return root
