"""Reads options from a TOML or JSON file strictly into a config dataclass, and writes such a file."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from .errors import ConfigError, reason
from .formats.json_file import read_json
from .formats.reading import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AnyConfig = TypeVar("AnyConfig")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_options(path: Path, config: type[Any]) -> dict[str, Any]:
    """The options in `path` (.toml or .json) as keyword arguments of the dataclass `config`.

    Names may have - or _. Tables [[name]] give the values of the field `names`. Raises ConfigError for an unknown name
    or a value of a wrong type.
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
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            name += _SEVERAL
        _check_known(name, key, hints, str(path))
        options[name] = typed(value, hints[name], f"{path}: {key}")
    return options


def _check_known(name: str, key: str, known: Mapping[str, Any], what: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        raise ConfigError(f"{what}: unknown option {key!r}" + (f": is {close[0]} meant?" if close else ""))


def _table(value: Mapping[str, Any], config: type[AnyConfig], what: str) -> AnyConfig:
    """The table `value` as the dataclass `config`. Raises ConfigError as `read_options` does, naming `what`."""
    hints, options = get_type_hints(config), {}
    for key, item in value.items():
        name = key.replace("-", "_")
        _check_known(name, key, hints, what)
        options[name] = typed(item, hints[name], f"{what}: {key}")
    for field in fields(config):  # type: ignore[arg-type]
        if field.default is MISSING and field.name not in options:
            raise ConfigError(f"{what}: a table needs {field.name}")
    try:
        return config(**options)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error


def dump_options(config: Any) -> str:
    """All options of `config` as TOML, in the form that `read_options` reads."""
    tables = {name for name, hint in get_type_hints(type(config)).items() if any(map(is_dataclass, get_args(hint)))}
    values = to_json(config)
    lines = _toml_lines({name: value for name, value in values.items() if name not in tables})
    for name in tables:
        for table in values[name]:
            lines += ["", f"[[{name.removesuffix(_SEVERAL)}]]", *_toml_lines(table)]
    return "\n".join(lines) + "\n"


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    """A line for each value. TOML has no null, so None is left out; it is the default."""
    return [f"{name} = {json.dumps(v, ensure_ascii=False)}" for name, v in values.items() if v is not None]


def to_json(config: Any) -> dict[str, Any]:
    """`config` as JSON values: paths as text, tuples as lists, dataclasses as objects."""
    return {field.name: plain(getattr(config, field.name)) for field in fields(config)}


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
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _table(value, cast(type[Any], hint), what)
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
    raise ConfigError(f"{what}: {value!r} is not {_KINDS.get(hint, 'a table')}")


_SEVERAL = "s"  # what the name of a field has more than the name of its tables
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


def plain(value: Any) -> Any:
    """The value of an option as `to_json` gives it."""
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value):
        return to_json(value)
    return [plain(item) for item in value] if isinstance(value, tuple) else value
