"""JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zimage_ref.errors import FormatError, ZImageError, reason


def read_json(path: Path, error: type[ZImageError] = FormatError) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error`, the one that the caller promises, if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as cause:
        raise error(f"{path}: cannot be read as JSON: {reason(cause)}") from cause
    if not isinstance(data, dict):
        raise error(f"{path}: holds a JSON {type(data).__name__} where an object belongs")
    return data
