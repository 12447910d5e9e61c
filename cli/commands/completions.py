"""zimage completions: prints a script for a shell. With it the shell completes commands, options and values."""

from __future__ import annotations

import argparse

import shtab

from ..terminal.console import Console
from ..terminal.parser import CommandParser
from . import root_parser

SHELLS = ("bash", "zsh", "fish")
_EXAMPLES = (
    (
        "bash:",
        "mkdir -p ~/.local/share/bash-completion/completions && "
        "zimage completions bash > ~/.local/share/bash-completion/completions/zimage",
    ),
    ("zsh, into a folder of $fpath:", "zimage completions zsh > ~/.zfunc/_zimage"),
    ("fish:", "zimage completions fish > ~/.config/fish/completions/zimage.fish"),
)


def add_options(parser: CommandParser) -> None:
    """Adds the argument of `zimage completions`."""
    parser.usage = "zimage completions SHELL"
    parser.examples = _EXAMPLES
    parser.notes = "Start a new shell afterwards. Print the script again after an update of zimage."
    parser.option("shell", "Shell to print the script for.", choices=SHELLS, metavar="SHELL")


def run(args: argparse.Namespace, console: Console) -> None:
    """Prints the script."""
    root = root_parser()
    for command in root.commands.values():
        for action, info in command.infos.items():
            if info.is_path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # read by shtab
    script: str = shtab.complete(root, args.shell)
    console.raw(f"{script}\n".encode())
