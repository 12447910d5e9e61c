"""JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zimage_ref.errors import ConfigError, reason


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {reason(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a JSON {type(data).__name__} where an object belongs")
    return data
