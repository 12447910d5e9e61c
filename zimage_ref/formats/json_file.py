"""Reads JSON files that hold one object. Writes JSON files completely or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from zimage_ref.errors import FormatError, ZImageError, reason

from .files import atomic_write
from .reading import read_text
from .strangers import stranger_in

# A JSON object. Its values are whatever the file holds: check one before you rely on it
Json: TypeAlias = Mapping[str, Any]
JsonObject: TypeAlias = dict[str, Any]


def read_json(path: Path, error: type[ZImageError] = FormatError, unique: bool = False) -> JsonObject:
    """The JSON object in `path`. Raises `error`, the class that the caller documents, if there is no such object.

    unique: a name that an object holds twice is a fault, too; else the last one counts.
    """
    try:
        data = json.loads(read_text(path), object_pairs_hook=_unique if unique else None)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as cause:
        if stranger := stranger_in(path):
            raise error(stranger) from cause
        raise error(f"{path}: cannot be read as JSON: {reason(cause)}") from cause
    if not isinstance(data, dict):
        raise error(f"{path}: holds a JSON {type(data).__name__}, not an object")
    return data


def _unique(pairs: list[tuple[str, object]]) -> JsonObject:
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0]} is there twice")
    return dict(pairs)


def json_bytes(data: object) -> bytes:
    """The content of a JSON file, indented so that people can read it."""
    return (json.dumps(data, indent=2) + "\n").encode()


def write_json(path: Path, data: object) -> None:
    """Writes `data` to `path`, completely or not at all."""
    with atomic_write(path) as file:
        file.write(json_bytes(data))
