"""The entry point. It runs one command and turns errors into a line and an exit code.

Exit codes:
    0      done
    1      an error, explained in one line
    2      a command line that cannot be parsed
    130    stopped by Ctrl-C
    129    stopped by SIGHUP: the terminal was closed
    143    stopped by SIGTERM
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from zimage_ref.errors import ZImageError, reason
from zimage_ref.formats.files import disk_is_full

from .commands import load, root_parser
from .terminal.console import Console
from .terminal.signals import INTERRUPTED, STOPPED, Terminated, unwinding


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = root_parser(words).parse_args(words)
    console = console or Console()
    try:
        with unwinding():
            code = load(args.command).run(args, console)
    except ZImageError as error:
        console.error(str(error))
        return 1
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # such as a full disk, or a folder without permission to write
        fact = "the disk is full: make room and start again" if disk_is_full(error) else reason(error)
        console.error(f"{error.filename or 'file system'}: {fact}")
        return 1
    except MemoryError as error:
        console.error(f"this machine has no memory left: {error}: take a smaller size")
        return 1
    except UnicodeError as error:
        console.error(f"a text or a path is not valid Unicode: {error}")
        return 1
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED
    except Terminated as error:
        console.error(STOPPED[error.number])
        return 128 + error.number
    return code or 0
