"""Reads a config from JSON strictly, key by key. It refuses values that no model can have."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol, TypeVar

from zimage_ref.bounds import LONGEST_LIST, MODEL
from zimage_ref.errors import ConfigError
from zimage_ref.formats.json_file import Json, JsonObject

AnyConfig = TypeVar("AnyConfig", bound="Config")


class Config(Protocol):
    """The interface of every config: it is read from JSON in the folder of a model, and written there as JSON."""

    @classmethod
    def from_json(cls: type[AnyConfig], data: Json, source: str) -> AnyConfig:
        """Reads the official keys. Raises ConfigError naming `source` if a key is missing or not supported."""

    def to_json(self) -> JsonObject:
        """The official keys and their values."""

    def __hash__(self) -> int:
        """Configs are compared by value and used as keys of caches."""


def parse_config(kind: type[AnyConfig], data: Json, source: str) -> AnyConfig:
    """The config of class `kind` in `data`. Raises ConfigError naming `source`, also for a value of a wrong type."""
    try:
        return kind.from_json(data, source)
    except ConfigError as error:
        fact = str(error)
        raise ConfigError(fact if fact.startswith(source) else f"{source}: {fact}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ConfigError(f"{source}: has a value of a wrong kind: {error}") from error


def check_values(config: object) -> None:
    """Raises ConfigError unless each number of the dataclass `config` is within its bounds (`bounds.MODEL`)."""
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        bounds = MODEL.get(field.name)
        if bounds and (len(values) > LONGEST_LIST or any(bounds.fault(item) for item in values)):
            raise ConfigError(f"{field.name} = {value!r} is not a size or number that a model can have")


class Reader:
    """Strict access to a JSON object. It raises ConfigError if a key is missing or has an unsupported value."""

    def __init__(self, data: Json, source: str) -> None:
        self.data, self.source = data, source

    def value(self, key: str) -> Any:
        """The value of `key`, of any type: `check_values` checks it. Raises ConfigError if the key is missing."""
        if key not in self.data:
            raise ConfigError(f"{self.source}: the key {key!r} is missing")
        return self.data[key]

    def require(self, key: str, supported: object) -> None:
        """Raises ConfigError unless the key is there and has the value `supported`."""
        actual = self.value(key)
        if actual != supported and (actual or supported):  # null, false and 0 all mean: not used
            raise ConfigError(f"{self.source}: {key} = {actual!r} is not supported, only {supported!r}")

    def patch_size(self) -> int:
        """The patch size of a config with the blocks of the transformer. See `block_facts`."""
        self.require("qk_norm", True)
        self.require("n_kv_heads", self.value("n_heads"))
        self.require("all_f_patch_size", [1])
        sizes: list[int] = self.value("all_patch_size")
        if len(sizes) != 1:
            raise ConfigError(f"{self.source}: all_patch_size {sizes} must name one size")
        return sizes[0]

    def require_if_there(self, key: str, supported: object) -> None:
        """As `require`, for an optional key. A missing key means `supported`."""
        if key in self.data:
            self.require(key, supported)


def block_facts(n_heads: int, patch_size: int) -> JsonObject:
    """The keys of JSON that every config with the blocks of the transformer has. `Reader.patch_size` requires them."""
    return {"all_patch_size": [patch_size], "all_f_patch_size": [1], "n_kv_heads": n_heads, "qk_norm": True}
