"""Helpers to define options. Each option is defined once, with its default, type, help text and bounds.

The command line, the Python interface and the tables in docs/ all use these definitions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from typing import Any, TypeVar

from .errors import ConfigError

AnyDefault = TypeVar("AnyDefault")

MEMORY = ("auto", "lean", "fast")  # lean takes less memory, fast takes less time


def option(default: AnyDefault, help: str, **traits: bool) -> AnyDefault:
    """A dataclass field with a default, a help text for the command line, and traits (see `training.config`)."""
    return field(default=default, metadata={"help": help, **traits})


def required(help: str, **traits: bool) -> Any:
    """A dataclass field without a default."""
    return field(metadata={"help": help, **traits})


def at_least(config: object, low: float, *names: str) -> None:
    """Raises ConfigError if one of the fields `names` of `config` is below `low`. None is allowed."""
    for name in names:
        if getattr(config, name) is not None and not getattr(config, name) >= low:
            raise ConfigError(f"`{name}` {getattr(config, name)} must be at least {low}")


def at_most(config: object, high: float, *names: str) -> None:
    """Raises ConfigError if one of the fields `names` of `config` is above `high`. None is allowed."""
    for name in names:
        if getattr(config, name) is not None and not getattr(config, name) <= high:
            raise ConfigError(f"`{name}` {getattr(config, name)} must be at most {high}")


def one_of(config: object, name: str, known: Iterable[str]) -> None:
    """Raises ConfigError unless the field `name` of `config` is one of `known`."""
    if getattr(config, name) not in known:
        raise ConfigError(f"`{name}` {getattr(config, name)!r} is unknown: known are {', '.join(known)}")
