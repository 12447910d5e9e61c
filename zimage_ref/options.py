"""Helpers to define options. Each option is defined once, with its default, type, help text, group and bounds.

The command line, the Python interface and the tables in docs/ all use these definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import Field, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError

AnyDefault = TypeVar("AnyDefault")
Choices = Iterable[str] | Callable[[], Iterable[str]]  # a function if the known values follow from a table

# fast takes the least time, lean less memory; stream takes the least: it reads weights as they are needed
MEMORY = ("auto", "lean", "fast", "stream")


class Group(Enum):
    """The groups of options of one command, in the order that help shows them. A value is the title of the group."""


def option(
    default: AnyDefault,
    help: str,
    group: Group | None = None,
    *,
    choices: Choices = (),
    value: str = "",
    **traits: bool,
) -> AnyDefault:
    """A dataclass field with a default, and what is known of the option.

    help: sentences. A field in backticks stands for its option on the command line.
    group: help and pages show the option under this title.
    choices: the only values that it can have, see `check_choices`.
    value: a word for the value in help, such as FILE; by default it follows from the type.
    traits: essential (short help shows it, too), auto (None means that the program decides) and those of
    `training.config`.
    """
    return field(default=default, metadata=_metadata(help, group, choices, value, traits))


def required(help: str, group: Group | None = None, *, value: str = "", **traits: bool) -> Any:
    """A dataclass field without a default."""
    return field(metadata=_metadata(help, group, (), value, traits))


def _metadata(
    help: str, group: Group | None, choices: Choices, value: str, traits: dict[str, bool]
) -> dict[str, object]:
    return {"help": help, "group": group, "choices": choices, "value": value, **traits}


def choices_of(field: Field[Any]) -> tuple[str, ...]:
    """The only values that a field can have, now; () if it is free."""
    known = field.metadata.get("choices", ())
    return tuple(known() if callable(known) else known)


def check_choices(config: Any) -> None:
    """Raises ConfigError unless each field of the dataclass `config` that has choices is one of them."""
    for each in fields(config):
        if known := choices_of(each):
            value = getattr(config, each.name)
            for item in value if isinstance(value, tuple) else (value,):
                one_of(each.name, item, known)


def one_of(name: str, value: object, known: Collection[object]) -> None:
    """Raises ConfigError unless `value` of the field `name` is one of `known`."""
    if value not in known:
        raise ConfigError(f"`{name}` {value!r} is unknown: known are {', '.join(map(str, known))}")


def path_and_scale(text: str, what: str = "LoRA") -> tuple[Path, float]:
    """Splits PATH or PATH:SCALE, the form for LoRAs and ControlNets. The scale is 1.0 if there is none.

    If a file with that exact name exists, the whole text is the path.
    """
    path, colon, scale = text.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not colon or Path(text).exists():
        return Path(text), 1.0
    if not path or not math.isfinite(number):
        raise ConfigError(f"{text}: give a {what} as PATH or PATH:SCALE; SCALE is a finite number")
    return Path(path), number
