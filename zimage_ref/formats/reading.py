"""Reads files that people name: only regular files, and texts with any byte order mark.

A pipe would make the program wait, and a device may have no end. So both are refused.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# Longer marks come first: the mark of UTF-32 begins with the mark of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_descriptor(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """The descriptor of the file `path`, open for reading; may be the `opener` of `open`.

    Raises OSError if it cannot be opened, or is a pipe, a socket or a device.
    """
    # Without O_NONBLOCK, opening a pipe waits until somebody writes into it
    extra = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags | extra)
    if stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    raise OSError(errno.EINVAL, "is a pipe, a socket or a device, not a file", str(path))


def open_file(path: Path) -> BinaryIO:
    """The file `path`, open for reading. Raises as `open_descriptor` does."""
    return open(path, "rb", opener=open_descriptor)


def read_bytes(path: Path) -> bytes:
    """The content of the file `path`. Raises as `open_descriptor` does."""
    with open_file(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """The text in the file `path`, with "\\n" at the end of lines. It is UTF-8, unless a byte order mark says other.

    Raises as `open_descriptor` does, and UnicodeDecodeError.
    """
    return decoded_text(read_bytes(path))


def decoded_text(data: bytes) -> str:
    """`data` as text, as `read_text` does it. Raises UnicodeDecodeError."""
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
