"""How a config is read from JSON: strictly, key by key, and no value is taken that a model cannot have."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Protocol, TypeVar, get_type_hints

from zimage_ref.errors import ConfigError
from zimage_ref.formats.json_file import Json, JsonObject

_TOO_LARGE = 1 << 31  # for a size
_TOO_MANY = 1000  # layers: no config can ask for names without end

AnyConfig = TypeVar("AnyConfig", bound="Config")


class Config(Protocol):
    """What every config offers: it is read from the JSON of a model's folder, and written to it."""

    @classmethod
    def from_json(cls: type[AnyConfig], data: Json, source: str) -> AnyConfig:
        """Reads the official keys. Raises ConfigError naming `source` for one that is missing or not supported."""

    def to_json(self) -> JsonObject:
        """The official keys again."""

    def __hash__(self) -> int:
        """Configs are compared by value, and are keys of caches."""


def parse_config(kind: type[AnyConfig], data: Json, source: str) -> AnyConfig:
    """The config of class `kind` in `data`. Raises ConfigError naming `source`, also for values of a wrong type."""
    try:
        return kind.from_json(data, source)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ConfigError(f"{source}: has a value of a wrong kind: {error}") from error


def check_values(config: object, layers: Collection[str]) -> None:
    """Raises ConfigError unless each field of a dataclass is what its annotation says.

    A float is finite, an int positive and no larger than a model can have.
    layers: names of the fields that count layers.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if kind is float:
            good = all(type(v) in (int, float) and abs(v) < math.inf for v in values)
        else:
            limit = _TOO_MANY if name in layers else _TOO_LARGE
            good = len(values) <= _TOO_MANY and all(type(v) is int and 0 < v < limit for v in values)
        if not good:
            raise ConfigError(f"{name} = {value!r} is no size or number that a model can have")


class Reader:
    """Strict access to a JSON object: a missing key, or a value that is not implemented, raises ConfigError."""

    def __init__(self, data: Json, source: str) -> None:
        self.data, self.source = data, source

    def value(self, key: str) -> Any:
        """The value of `key`, which must be there. It is of any type: see `check_values`."""
        if key not in self.data:
            raise ConfigError(f"{self.source}: the key {key!r} is missing")
        return self.data[key]

    def require(self, key: str, supported: object) -> None:
        """The key must be there, with the one value that is supported."""
        actual = self.value(key)
        if actual != supported and (actual or supported):  # null, false and 0 all mean: not used
            raise ConfigError(f"{self.source}: {key} = {actual!r} is not supported, only {supported!r}")

    def require_if_there(self, key: str, supported: object) -> None:
        """As `require`, for a key that may be left out, which means `supported`."""
        if key in self.data:
            self.require(key, supported)
