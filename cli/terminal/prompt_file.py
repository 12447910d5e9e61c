"""Files with prompts, one in each line."""

from __future__ import annotations

import sys
from pathlib import Path

from zimage_ref import ConfigError
from zimage_ref.errors import reason
from zimage_ref.formats.reading import read_text


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank. - is stdin. Raises ConfigError if there is none, or no text."""
    try:
        text = sys.stdin.read().removeprefix("\ufeff") if path == Path("-") else read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {reason(error)}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: holds no prompts: write one a line")
    return prompts
