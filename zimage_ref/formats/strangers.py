"""Names files that are not what their suffix says: pointers of git-lfs, web pages, empty and half-downloaded files."""

from __future__ import annotations

import re
from pathlib import Path

from zimage_ref.errors import FormatError

from .reading import open_file

_HEAD = 512  # bytes that are looked at
_AGAIN = "download it again"
# the start of a file -> what it is, and the way out
_STARTS = (
    (rb"version https://git-lfs", "a pointer of git-lfs, not the file: run `git lfs pull`, or download the file"),
    (rb"\s*(<!doctype html|<html|<\?xml|<head)", f"a web page, not the file: the download failed; {_AGAIN}"),
    (rb'\s*\{"error"|\s*(Entry not found|Invalid (username|credentials)|Access to (model|this))',
     f"an error message of the server, not the file; {_AGAIN}, logged in if the model asks for it"),
    (rb"\x00\x05\x16\x07", "a file that macOS left (AppleDouble), not weights: take the one without `._`"),
    (rb"(?s)\x80[\x02-\x05](?!.{6}\{)", "a pickle, which could run programs and is never opened: take safetensors"),
)  # fmt: skip
_PARTLY = (".part", ".crdownload", ".download", ".incomplete", ".aria2", ".tmp")  # of programs that download


def check_not_stranger(path: Path) -> None:
    """Raises FormatError if the first bytes of `path` show that it is none of the files that are read here."""
    head = _head(path)
    if head == b"":
        raise FormatError(f"{path}: is empty: {_AGAIN}")
    if stranger := stranger_in(path):
        raise FormatError(stranger)
    if head and not head.strip(b"\0"):
        raise FormatError(f"{path}: begins with zeros only: it was not downloaded to its end; {_AGAIN}")


def stranger_in(path: Path) -> str:
    """A line that says what `path` is, if it is something else than its name says; else ""."""
    head = _head(path) or b""
    fact = next((fact for pattern, fact in _STARTS if re.match(pattern, head, re.IGNORECASE)), "")
    return f"{path}: is {fact}" if fact else ""


def _head(path: Path) -> bytes | None:
    try:
        with open_file(path) as file:
            return file.read(_HEAD)
    except (OSError, ValueError):
        return None  # whoever opens it next says why


def partly_downloaded(path: Path, there: int, needed: int) -> FormatError:
    """The error for a file that has only `there` of `needed` bytes."""
    return FormatError(
        f"{path}: is not whole: {there:,} of {needed:,} bytes are there: it was not downloaded to its end, "
        f"or is still being downloaded; {_AGAIN}"
    )


def unfinished(folder: Path) -> list[str]:
    """The names of files in `folder` that a program is still downloading."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in _PARTLY) if folder.is_dir() else []
