"""What a user can ask for: each option once, with its default, type, help text and bounds.

The command line, the Python interface and the README all take them from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from typing import Any, TypeVar

from .errors import ConfigError

AnyDefault = TypeVar("AnyDefault")

MEMORY = ("auto", "lean", "fast")  # how memory is traded for time


def option(default: AnyDefault, help: str, **traits: bool) -> AnyDefault:
    """A dataclass field with a default, the help text that the command line shows, and traits of `training.config`."""
    return field(default=default, metadata={"help": help, **traits})


def required(help: str, **traits: bool) -> Any:
    """A dataclass field without a default."""
    return field(metadata={"help": help, **traits})


def at_least(config: object, low: float, *names: str) -> None:
    """Raises ConfigError if one of the fields `names` of `config` is below `low`; None is not."""
    for name in names:
        if getattr(config, name) is not None and not getattr(config, name) >= low:
            raise ConfigError(f"`{name}` {getattr(config, name)} must be at least {low}")


def at_most(config: object, high: float, *names: str) -> None:
    """Raises ConfigError if one of the fields `names` of `config` is above `high`; None is not."""
    for name in names:
        if getattr(config, name) is not None and not getattr(config, name) <= high:
            raise ConfigError(f"`{name}` {getattr(config, name)} must be at most {high}")


def one_of(config: object, name: str, known: Iterable[str]) -> None:
    """Raises ConfigError unless the field `name` of `config` is one of `known`."""
    if getattr(config, name) not in known:
        raise ConfigError(f"`{name}` {getattr(config, name)!r} is unknown: known are {', '.join(known)}")
