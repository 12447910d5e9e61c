"""Turns a config dataclass into command-line options and back. Name, type, default and help come from the fields."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from zimage_ref.errors import ConfigError
from zimage_ref.options import choices_of
from zimage_ref.options_file import typed

from .parser import CommandParser, OptionInfo, shown_default

AnyConfig = TypeVar("AnyConfig")

_VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}  # the words for values of a type in help


def flag(name: str) -> str:
    """The command-line option that sets the field `name`."""
    return f"--{name.replace('_', '-')}"


def in_flags(text: str) -> str:
    """`text` of the library with fields in backticks replaced by command-line options."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda field: flag(field[1]), text)


def add_fields(
    parser: CommandParser, config: type[Any], from_file: bool = False, without: Collection[str] = ()
) -> None:
    """One option for each field of the dataclass `config` except those `without`; one without a default is required.

    from_file: a file may give values too, so options that are not given are left out of the parsed arguments.
    """
    hints = get_type_hints(config)
    for field in fields(config):
        if field.name in without:
            continue
        settings = _settings(field, hints[field.name])
        if from_file:
            settings |= {"default": argparse.SUPPRESS, "required": False}
        parser.add(_info(field, hints[field.name]), dest=field.name, **settings)


def from_args(config: type[AnyConfig], args: argparse.Namespace, file: Mapping[str, Any] | None = None) -> AnyConfig:
    """The `config` from the parsed `args`. `file` gives the values that are not in `args`.

    Raises ConfigError for values out of bounds, and if a required value is in neither.
    """
    known = {field.name: field for field in fields(config)}  # type: ignore[arg-type]
    given = {**(file or {}), **{name: getattr(args, name) for name in known if hasattr(args, name)}}
    missing = [flag(name) for name, field in known.items() if field.default is MISSING and name not in given]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: must be given, here or in --config")
    return config(**given)


def _info(field: Field[Any], hint: Any) -> OptionInfo:
    """The facts about a field that help and pages show."""
    default = "required" if field.default is MISSING else shown_default(field.default)
    return OptionInfo(
        flag(field.name),
        in_flags(field.metadata["help"]),
        "auto" if field.metadata.get("auto") else default,
        choices_of(field),
        field.metadata.get("group"),
        field.metadata.get("essential", False),
        is_path=Path in (hint, *get_args(hint)),
    )


def _settings(field: Field[Any], hint: Any) -> dict[str, Any]:
    """The settings of argparse for a field."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if field.default is True else "store_true"}
    several = get_origin(hint) is tuple
    commas = several and not field.metadata.get("repeatable")
    settings: dict[str, Any] = {"type": _parser(hint, commas), "metavar": _value(field, hint, commas)}
    if field.default is MISSING:
        return {**settings, "required": True}
    if choices_of(field) and not several:  # of several, the config checks each
        settings["choices"] = choices_of(field)
    return {**settings, "default": field.default, **({"action": _Collect} if several else {})}


def _value(field: Field[Any], hint: Any, commas: bool) -> str:
    """The word for a value of a field in help."""
    inner = next((kind for kind in (hint, *get_args(hint)) if kind in _VALUES), str)
    word: str = field.metadata["value"] or ("NAME" if choices_of(field) else _VALUES[inner])
    return f"{word},..." if commas else word


def _parser(hint: Any, commas: bool) -> Any:
    """A function from the text of an option to its value. With `commas`, it splits the text into several values."""

    def parse(text: str) -> Any:
        parts = [part.strip() for part in text.split(",")] if commas else text
        try:
            return typed(parts, hint, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None

    return parse


class _Collect(argparse.Action):
    """Collects the values of an option that is given several times."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest, self.default)
        seen = before if before is not self.default and isinstance(before, tuple) else ()
        setattr(namespace, self.dest, (*seen, *values))
