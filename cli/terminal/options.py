"""A config dataclass as command-line options and back: name, type, default and help are the field's own."""

from __future__ import annotations

import argparse
import math
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

_VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}  # the words that help has for values of a type


def flag(name: str) -> str:
    """The command line's option that sets the field `name`."""
    return f"--{name.replace('_', '-')}"


def in_flags(text: str) -> str:
    """`text` of a library, with the fields that it names in backticks as the options of the command line."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda field: flag(field[1]), text)


def add_fields(
    parser: CommandParser, config: type[Any], from_file: bool = False, without: Collection[str] = ()
) -> None:
    """One option for each field of the dataclass `config` except those `without`; one without a default is required.

    from_file: values may also come from a file, so what is not given stays out of the parsed arguments.
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
    """The `config` that the parsed `args` describe, `file` giving what they leave out.

    Raises ConfigError for values out of bounds, and where a required one is in neither.
    """
    known = {field.name: field for field in fields(config)}  # type: ignore[arg-type]
    given = {**(file or {}), **{name: getattr(args, name) for name in known if hasattr(args, name)}}
    missing = [flag(name) for name, field in known.items() if field.default is MISSING and name not in given]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: must be given, here or in --config")
    return config(**given)


def path_and_scale(text: str) -> tuple[Path, float]:
    """PATH or PATH:SCALE, as LoRAs are given; 1.0 where there is no scale. A file called so wins over a scale."""
    path, colon, scale = text.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not colon or Path(text).exists():
        return Path(text), 1.0
    if not path or not math.isfinite(number):
        raise ConfigError(f"{text}: a LoRA is given as PATH or PATH:SCALE, where SCALE is a finite number")
    return Path(path), number


def _info(field: Field[Any], hint: Any) -> OptionInfo:
    """What help and pages say of a field."""
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
    """What argparse has to know of a field."""
    if hint is bool:
        return {"action": "store_true"}
    several = get_origin(hint) is tuple
    commas = several and not field.metadata.get("repeatable")
    settings: dict[str, Any] = {"type": _parser(hint, commas), "metavar": _value(field, hint, commas)}
    if field.default is MISSING:
        return {**settings, "required": True}
    if choices_of(field) and not several:  # of several, the config checks each
        settings["choices"] = choices_of(field)
    return {**settings, "default": field.default, **({"action": _Collect} if several else {})}


def _value(field: Field[Any], hint: Any, commas: bool) -> str:
    """The word that help has for a value."""
    inner = next((kind for kind in (hint, *get_args(hint)) if kind in _VALUES), str)
    word: str = field.metadata["value"] or ("NAME" if choices_of(field) else _VALUES[inner])
    return f"{word},..." if commas else word


def _parser(hint: Any, commas: bool) -> Any:
    """A function from an option's text to its value, or to several where they are separated by commas."""

    def parse(text: str) -> Any:
        parts = [part.strip() for part in text.split(",")] if commas else text
        try:
            return typed(parts, hint, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None

    return parse


class _Collect(argparse.Action):
    """Values of an option that is given several times, one after the other."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest, self.default)
        seen = before if before is not self.default and isinstance(before, tuple) else ()
        setattr(namespace, self.dest, (*seen, *values))
