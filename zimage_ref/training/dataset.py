"""Pictures with captions, in a folder and its subfolders.

Each caption is in a .txt with the name of its picture, or one file in the folder holds all captions:

    metadata.jsonl    one JSON object a line: {"file_name": "sub/fox.png", "text": "a fox"}    (datasets' imagefolder)
    captions.json     one JSON object: {"sub/fox.png": "a fox"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zimage_ref.errors import DatasetError, listing, reason
from zimage_ref.formats.files import sha256
from zimage_ref.formats.json_file import read_json
from zimage_ref.formats.tensors import Array
from zimage_ref.pictures.formats import PICTURE_SUFFIXES
from zimage_ref.pictures.images import cover, mirror, read_picture, to_array

_CAPTION_KEYS = ("text", "caption", "prompt")
TRIGGER_MARK = "[trigger]"
RUN_SUFFIX = ".run"  # the suffix of the folder that a run keeps beside its output: see run_folder


@dataclass(frozen=True)
class Example:
    """One picture to train on, and its caption."""

    picture: Path
    caption: str
    size: tuple[int, int]  # width, height in pixels, upright
    digest: str  # SHA-256 of the file

    @classmethod
    def open(cls, picture: Path, caption: str) -> Example:
        """Reads the picture once. Raises DatasetError if it cannot be read."""
        size = read_picture(picture).size
        return cls(picture, caption, size, sha256(picture))

    def pixels(self, width: int, height: int, flip: bool = False) -> Array:
        """The picture as (3, height, width) float32 in [-1, 1], scaled and cropped by `cover`; mirrored if `flip`."""
        picture = cover(read_picture(self.picture), width, height)
        return to_array(mirror(picture) if flip else picture)


def list_dataset(folder: Path, trigger: str = "") -> list[tuple[Path, str]]:
    """Every picture of `folder` with its caption, which includes `trigger`. Sorted by path; pictures are not read yet.

    Raises DatasetError naming the file if there is no folder, no picture, a missing or empty caption, a caption without
    a picture, or one caption file for two pictures.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: is not a folder: `dataset` takes one with pictures and captions")
    pictures = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES and not _hidden(path.relative_to(folder)) and path.is_file()
    )
    if not pictures:
        raise DatasetError(f"{folder}: holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    captions = _captions(folder, pictures)
    return [(picture, with_trigger(caption, trigger)) for picture, caption in zip(pictures, captions, strict=True)]


def with_trigger(caption: str, trigger: str) -> str:
    """`caption` with `trigger` in place of [trigger]. If it has neither of them, `trigger` is put before it."""
    if not trigger:
        return caption
    if TRIGGER_MARK in caption:
        return caption.replace(TRIGGER_MARK, trigger)
    return caption if trigger in caption else f"{trigger}, {caption}"


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits `examples` in two: those to train on, and those held out. `seed` chooses which are held out.

    Held out are `fraction` of them, at least one. Raises DatasetError if none would remain to train on.
    """
    count = max(1, round(fraction * len(examples)))
    if count >= len(examples):
        raise DatasetError(f"`validation` {fraction:g} of {len(examples)} pictures leaves none to train on")
    held = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )


def fingerprint(examples: Sequence[Example]) -> str:
    """A digest of all pictures, captions and their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.digest, example.caption]).encode())
    return digest.hexdigest()


def _hidden(path: Path) -> bool:
    """Whether `path` lies in a hidden folder, or in the folder of a run, which holds previews."""
    return any(part.startswith(".") or part.endswith(RUN_SUFFIX) for part in path.parts)


def _captions(folder: Path, pictures: Sequence[Path]) -> list[str]:
    """The caption of each picture: from the one file of the folder if it has one, else from a .txt for each."""
    files = [path for path in (folder / "metadata.jsonl", folder / "captions.json") if path.is_file()]
    if len(files) > 1:
        raise DatasetError(f"{folder}: has both metadata.jsonl and captions.json: keep one of them")
    if files:
        return _captions_of(files[0], pictures)
    by_caption: dict[Path, list[str]] = {}
    for picture in pictures:
        by_caption.setdefault(picture.with_suffix(".txt"), []).append(picture.name)
    for caption, sharing in by_caption.items():
        if len(sharing) > 1:
            raise DatasetError(f"{caption}: would be the caption of {listing(sharing)}: give each picture its own name")
    return [_caption_beside(picture) for picture in pictures]


def _caption_beside(picture: Path) -> str:
    path = picture.with_suffix(".txt")
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise DatasetError(f"{picture}: has no caption: write one into {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8 text: {reason(error)}") from error
    if not caption:
        raise DatasetError(f"{path}: is empty: write what {picture.name} shows")
    return caption


def _captions_of(file: Path, pictures: Sequence[Path]) -> list[str]:
    captions: Mapping[str, object] = _read_jsonl(file) if file.suffix == ".jsonl" else read_json(file, DatasetError)
    names = [picture.relative_to(file.parent).as_posix() for picture in pictures]
    if missing := [name for name in names if name not in captions]:
        raise DatasetError(f"{file}: has no caption for {listing(missing)}")
    known = set(names)
    if strange := [name for name in captions if name not in known]:
        raise DatasetError(f"{file}: names {listing(strange)}, which the folder does not hold")
    texts = {}
    for name, caption in captions.items():
        if not isinstance(caption, str) or not caption.strip():
            raise DatasetError(f"{file}: the caption of {name} is not a text: write what it shows")
        texts[name] = caption.strip()
    return [texts[name] for name in names]


def _read_jsonl(file: Path) -> dict[str, object]:
    captions: dict[str, object] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
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
