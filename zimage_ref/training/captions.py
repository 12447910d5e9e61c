"""The captions of pictures: in a .txt beside each, or in one file of the folder.

    metadata.jsonl    one JSON object a line: {"file_name": "sub/fox.png", "text": "a fox"}    (datasets' imagefolder)
    captions.json     one JSON object: {"sub/fox.png": "a fox"}

Systems write one name in several ways: with composed letters (NFC) or not (NFD, macOS), with / or \\, with ./ before
it. The name as it is on disk comes first, then any of these.
"""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from zimage_ref.errors import DatasetError, listing, reason
from zimage_ref.formats.json_file import read_json
from zimage_ref.formats.reading import read_text

from .dataset_files import DatasetFiles

_CAPTION_KEYS = ("text", "caption", "prompt")
_LISTS = ("metadata.jsonl", "captions.json")
_SUFFIX = ".txt"


def read_captions(files: DatasetFiles, pictures: Sequence[Path], may_lack: bool) -> list[str]:
    """The caption of each of `pictures`. Captions that belong to none of them are added to what is left out.

    may_lack: a picture without a caption gets "". Raises DatasetError naming the file if there is another fault.
    """
    lists = [files.folder / name for name in _LISTS if files.folder / name in files.found]
    texts = [path for path in files.found if path.suffix.lower() == _SUFFIX]
    if len(lists) > 1:
        raise DatasetError(f"{files.folder}: has both metadata.jsonl and captions.json: keep one of them")
    if lists:
        for path in texts:
            files.leave_out(path, f"captions are read from {lists[0].name}")
        return _from_list(lists[0], files, pictures, may_lack)
    beside = _beside(pictures, texts)
    for path in texts:
        if path not in beside:
            files.leave_out(path, "a caption without a picture that is read")
    by_caption: dict[Path, list[str]] = {}
    for picture, path in zip(pictures, beside, strict=True):
        by_caption.setdefault(path, []).append(picture.name)
    for path, sharing in by_caption.items():
        if len(sharing) > 1:
            raise DatasetError(f"{path}: would be the caption of {listing(sharing)}: give each picture its own name")
    return [_caption(picture, path, may_lack) for picture, path in zip(pictures, beside, strict=True)]


def is_list(path: Path, folder: Path) -> bool:
    """Whether `path` is a file that holds all captions of `folder`."""
    return path.parent == folder and path.name in _LISTS


def is_caption(path: Path) -> bool:
    """Whether `path` has the suffix of captions beside pictures."""
    return path.suffix.lower() == _SUFFIX


def lines_of(caption: str) -> list[str]:
    """The lines of `caption` that are not empty, without space around them."""
    return [line.strip() for line in caption.splitlines() if line.strip()]


def _beside(pictures: Sequence[Path], texts: Sequence[Path]) -> list[Path]:
    """The caption file of each picture, whether it exists or not."""
    alike = {_composed(path.with_suffix("")): path for path in texts}
    exact, found = set(texts), []
    for picture in pictures:
        path = picture.with_suffix(_SUFFIX)
        found.append(path if path in exact else alike.get(_composed(picture.with_suffix("")), path))
    return found


def _composed(path: Path) -> str:
    return unicodedata.normalize("NFC", path.as_posix())


def _caption(picture: Path, path: Path, may_lack: bool) -> str:
    try:
        caption = read_text(path).strip()
    except FileNotFoundError:
        if may_lack:
            return ""
        raise DatasetError(
            f"{picture}: has no caption: write one into {path.name}, or give `trigger` for pictures without one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8 text: {reason(error)}") from error
    if not caption and not may_lack:
        raise DatasetError(f"{path}: is empty: write what {picture.name} shows")
    return caption


def _from_list(file: Path, files: DatasetFiles, pictures: Sequence[Path], may_lack: bool) -> list[str]:
    captions: Mapping[str, object]
    captions = _read_jsonl(file) if file.suffix == ".jsonl" else read_json(file, DatasetError, unique=True)
    names = [picture.relative_to(files.folder).as_posix() for picture in pictures]
    left_out = [path.relative_to(files.folder).as_posix() for paths in files.left_out.values() for path in paths]
    alike = {_plain(name): name for name in (*left_out, *names)}
    exact = {*left_out, *names}
    texts: dict[str, str] = {}
    strange = []
    for given, caption in captions.items():
        name = given if given in exact else alike.get(_plain(given))
        if name is None:
            strange.append(given)
        elif name in texts:
            raise DatasetError(f"{file}: names {name} a second time, as {given}")
        elif not isinstance(caption, str) or not (caption.strip() or may_lack):
            raise DatasetError(f"{file}: the caption of {given} is not a text: write what it shows")
        else:
            texts[name] = caption.strip()
    if not may_lack and (missing := [name for name in names if name not in texts]):
        raise DatasetError(f"{file}: has no caption for {listing(missing)}")
    if strange:
        raise DatasetError(f"{file}: names {listing(strange)}, which the folder does not hold")
    return [texts.get(name, "") for name in names]


def _plain(name: str) -> str:
    """`name` in one of the ways in which it may be written."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def _read_jsonl(file: Path) -> dict[str, object]:
    captions: dict[str, object] = {}
    try:
        lines = read_text(file).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: cannot be read as UTF-8 text: {reason(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{file}: line {number} is not JSON: {error}") from error
        found = [key for key in _CAPTION_KEYS if isinstance(entry, dict) and key in entry]
        if not found or not isinstance(entry.get("file_name"), str):
            raise DatasetError(f"{file}: line {number} needs file_name and one of {', '.join(_CAPTION_KEYS)}")
        if entry["file_name"] in captions:
            raise DatasetError(f"{file}: line {number} names {entry['file_name']} a second time")
        captions[entry["file_name"]] = entry[found[0]]
    return captions
