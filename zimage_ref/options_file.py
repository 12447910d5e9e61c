"""Reads options from a TOML or JSON file strictly into a config dataclass, and writes such a file."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import ConfigError, reason
from .formats.json_file import read_json
from .formats.reading import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_options(path: Path, config: type[Any]) -> dict[str, Any]:
    """The options in `path` (.toml or .json) as keyword arguments of the dataclass `config`.

    Names may have - or _. Raises ConfigError for an unknown name or a value of a wrong type.
    """
    if path.suffix == ".toml":
        data = _read_toml(path)
    elif path.suffix == ".json":
        data = read_json(path, ConfigError)
    else:
        raise ConfigError(f"{path}: options are read from .toml or .json")
    hints = get_type_hints(config)
    options = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 1)
            raise ConfigError(f"{path}: unknown option {key!r}" + (f": is {close[0]} meant?" if close else ""))
        options[name] = typed(value, hints[name], f"{path}: {key}")
    return options


def dump_options(config: Any) -> str:
    """All options of `config` as TOML, in the form that `read_options` reads."""
    lines = []
    for name, value in to_json(config).items():
        if value is not None:  # TOML has no null, so the option is left out; its default is None
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")  # these JSON values are TOML too
    return "\n".join(lines) + "\n"


def to_json(config: Any) -> dict[str, Any]:
    """`config` as JSON values: paths as text, tuples as lists."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def typed(value: Any, hint: Any, what: str) -> Any:
    """`value`, from a file or as text from a command line, converted to the type `hint`.

    Raises ConfigError naming `what` if it has another type.
    """
    if isinstance(hint, UnionType):  # X | None
        inner = next(part for part in get_args(hint) if part is not NoneType)
        return None if value in (None, "auto") else typed(value, inner, what)
    if get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(typed(item, get_args(hint)[0], what) for item in items)
    if hint is bool:
        return _boolean(value, what)
    if isinstance(value, str) and hint in (str, Path):
        _check_characters(value, what, is_path=hint is Path)
        return hint(value)
    if isinstance(value, (str, int, float)) and not isinstance(value, bool) and hint in (int, float):
        try:
            number = hint(value)
        except (ValueError, OverflowError):
            number = None
        if number is not None and (hint is float or isinstance(value, str) or number == value):
            return number
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # base_precision = 8, validation = 0.1
    raise ConfigError(f"{what}: {value!r} is not {_KINDS[hint]}")


_KINDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "true or false"}


def _check_characters(text: str, what: str, is_path: bool) -> None:
    """Raises ConfigError if `text` cannot be written as UTF-8, or is no path of this system."""
    try:
        os.fsencode(text) if is_path else text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what}: {text!r} is not valid Unicode: {error.reason}") from error
    if is_path and "\0" in text:
        raise ConfigError(f"{what}: {text!r} has a character that no path can have")


def _boolean(value: Any, what: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in (*TRUE, *FALSE):
        return value.lower() in TRUE
    raise ConfigError(f"{what}: {value!r} is not true or false")


def _read_toml(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {reason(error)}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
