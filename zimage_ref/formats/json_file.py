"""JSON files: objects that are read, and files that are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from zimage_ref.errors import FormatError, ZImageError, reason

from .files import atomic_write

# A JSON object. Its values are whatever the file holds: check one before you rely on it
Json: TypeAlias = Mapping[str, Any]
JsonObject: TypeAlias = dict[str, Any]


def read_json(path: Path, error: type[ZImageError] = FormatError) -> JsonObject:
    """The JSON object in `path`. Raises `error`, the one that the caller promises, if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as cause:
        raise error(f"{path}: cannot be read as JSON: {reason(cause)}") from cause
    if not isinstance(data, dict):
        raise error(f"{path}: holds a JSON {type(data).__name__} where an object belongs")
    return data


def json_bytes(data: object) -> bytes:
    """The content of a JSON file, for people to read too."""
    return (json.dumps(data, indent=2) + "\n").encode()


def write_json(path: Path, data: object) -> None:
    """Writes `data` to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json_bytes(data))
