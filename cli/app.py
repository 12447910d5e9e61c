"""The entry point: which command, and what becomes of its errors.

Exit codes: 0 done, 1 an error that one line explains, 2 a command line that does not parse, 130 and 143 stopped by
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from zimage_ref import ZImageError, __version__

from . import convert, demo, generate, inspection, train
from .console import Console

COMMANDS = {"train": train, "generate": generate, "convert": convert, "inspect": inspection, "demo": demo}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each adds its own options."""
    root = argparse.ArgumentParser("zimage", description="Z-Image: LoRA training, generation, conversion, inspection")
    root.add_argument("--version", action="version", version=f"zimage-mlx {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").split("\n")[0].partition(": ")[2]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_options(command)
    return root


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = parser().parse_args(argv)
    console = console or Console()
    try:
        with _terminable():
            code: int | None = COMMANDS[args.command].run(args, console)
    except ZImageError as error:
        console.error(str(error))
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        console.error(f"{error.filename or 'file system'}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        console.error("interrupted")
        return 130
    except _Terminated:
        console.error("terminated")
        return 143
    return code or 0


class _Terminated(BaseException):
    """SIGTERM came: everything unwinds, as it does for Ctrl-C, so that no half-written file stays."""


@contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
