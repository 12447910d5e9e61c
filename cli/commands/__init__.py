"""Knows: one command a file: its options, and what it does with them.
May import: terminal, zimage_ref.
Must never know: mlx, numpy, and how anything is computed.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Protocol, cast

from ..terminal.console import Console

# command, a module of this folder -> what `zimage --help` says of it
COMMANDS = {
    "train": "a LoRA from a folder of captioned pictures.",
    "generate": "pictures from prompts.",
    "convert": "weights from one file format, naming and precision to another.",
    "inspect": "what a weights file or a model's folder holds, from headers alone, or how a picture was made.",
    "doctor": "checks and measures this machine, and says what pictures and training will take.",
    "demo": "a new word, learned from eight drawings by a small model.",
}


class Command(Protocol):
    """A module of this folder that is a command."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options of the command."""

    def run(self, args: argparse.Namespace, console: Console) -> int | None:
        """Does what the parsed `args` ask for. Returns the exit code; None is 0."""


def load(name: str) -> Command:
    """The command `name`, imported now: a command's imports cost nothing until it is asked for."""
    return cast(Command, import_module(f".{name}", __package__))
