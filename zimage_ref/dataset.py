"""A folder of pictures, each with its caption in a .txt of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import DatasetError, listing
from .images import PICTURE_SUFFIXES, cover, read_picture, to_array
from .tensors import Array


@dataclass(frozen=True)
class Example:
    """One picture to train on and what it shows."""

    picture: Path
    caption: str

    def pixels(self, width: int, height: int) -> Array:
        """(3, height, width) float32 in [-1, 1], scaled to cover and cut around the centre."""
        return to_array(cover(read_picture(self.picture), width, height))


def read_dataset(folder: Path) -> list[Example]:
    """All examples of `folder`, sorted by name, every picture and caption read once to know that it can be.

    Raises DatasetError naming the file: no folder, no pictures, an unreadable picture, a missing or empty caption,
    two pictures that share one caption file.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: is not a folder: --dataset takes one with pictures and .txt captions")
    pictures = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith(".")
    )
    if not pictures:
        raise DatasetError(f"{folder}: holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    by_caption: dict[Path, list[str]] = {}
    for picture in pictures:
        by_caption.setdefault(picture.with_suffix(".txt"), []).append(picture.name)
    for caption, sharing in by_caption.items():
        if len(sharing) > 1:
            raise DatasetError(f"{caption}: would be the caption of {listing(sharing)}: give each picture its own name")
    examples = [Example(picture, _caption(picture)) for picture in pictures]
    for example in examples:
        read_picture(example.picture)
    return examples


def _caption(picture: Path) -> str:
    path = picture.with_suffix(".txt")
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise DatasetError(f"{picture}: has no caption: write one into {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not caption:
        raise DatasetError(f"{path}: is empty: write what {picture.name} shows")
    return caption
