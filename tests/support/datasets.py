"""The examples of a folder, as a run takes them."""

from __future__ import annotations

from pathlib import Path

from zimage_ref.training.dataset import Example, list_dataset


def read_dataset(folder: Path) -> list[Example]:
    """All examples of `folder`, sorted by path, every picture and caption read."""
    return [Example.open(picture, caption) for picture, caption in list_dataset(folder)]
