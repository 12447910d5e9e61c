"""A config dataclass as command-line options and back: name, type, default and help are the field's own."""

from __future__ import annotations

import argparse
import math
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from zimage_ref import ConfigError

AnyConfig = TypeVar("AnyConfig")


def add_fields(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """One option for each field of the dataclass `config`; a field without a default must be given."""
    hints = get_type_hints(config)
    for field in fields(config):
        parser.add_argument(flag(field.name), dest=field.name, **_settings(field, hints[field.name]))


def from_args(config: type[AnyConfig], args: argparse.Namespace) -> AnyConfig:
    """The `config` that the parsed `args` describe. Raises ConfigError for values out of bounds."""
    return config(**{field.name: getattr(args, field.name) for field in fields(config)})  # type: ignore[arg-type]


def flag(name: str) -> str:
    """The option that sets the field `name`."""
    return "--" + name.replace("_", "-")


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


def _settings(field: Field[Any], hint: Any) -> dict[str, Any]:
    help = field.metadata["help"].replace("%", "%%")
    if field.default is MISSING:
        return {"required": True, "type": hint, "metavar": field.name.upper(), "help": help}
    several = isinstance(field.default, tuple)
    shown = ",".join(field.default) if several else field.default
    return {
        "default": field.default,
        "type": _comma_separated if several else hint,
        "metavar": field.name.upper(),
        "help": f"{help} (default: {shown})" if shown != "" else help,
    }


def _comma_separated(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
