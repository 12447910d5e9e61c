"""The strength of a LoRA whose file has no alpha keys: it is in the metadata or in a JSON file beside the LoRA.

scale = alpha / rank          alpha / sqrt(rank) with PEFT's use_rslora

PEFT applies alpha / r of its config to LoKr and LoHa too, even to a LoKr of two whole matrices. There r is that of the
config (peft, tuners/lokr/layer.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats.json_file import read_json

from .parts import LARGEST, Scale

PEFT_METADATA = "lora_adapter_metadata"
_COMPONENT = "transformer."  # diffusers puts the name of the model before each of PEFT's keys

FoundAlpha = tuple[str, Scale]  # the place, in words; the scale of each module


@dataclass(frozen=True)
class AlphaSource:
    """One place that may hold the strength of a LoRA."""

    find: Callable[[Path, Mapping[str, object]], FoundAlpha | None]  # takes a LoRA's path and metadata
    beside: Callable[[Path], Path] | None = None  # gives the file beside a LoRA, if this place is such a file
    for_all: bool = False  # whether a file of any spelling may have it, because its name says what it is


def alpha_of(path: Path, metadata: Mapping[str, object], sources: Sequence[AlphaSource]) -> FoundAlpha:
    """The strength of a LoRA without alpha keys, from the first of `sources` that has it.

    Raises FormatError or ConfigError if one has it in a form that cannot be understood.
    """
    for source in sources:
        if found := source.find(path, metadata):
            return found
    if metadata.get("alpha_folded") in (True, "true"):
        return "metadata: multiplied into B already", _one
    return "default: alpha = rank", _one


def _one(module: str, rank: int | None) -> float:
    return 1.0


def sidecar(path: Path) -> Path:
    """The file beside the LoRA `path` where z-image-train stores rank, alpha and targets."""
    return path.with_suffix(".lora.json")


def _from_sidecar(path: Path, metadata: Mapping[str, object]) -> FoundAlpha:
    file = sidecar(path)
    if not file.is_file():
        raise FormatError(
            f"{path}: the strength of this LoRA is in {file.name}, which is not beside it; if it is lost, "
            'write one with {"alpha": N}; if N is the rank, the strength is 1'
        )
    data = read_json(file, ConfigError)
    if data.get("alpha_folded"):
        return file.name, _one
    alpha = _number(str(file), "alpha", data.get("alpha"))
    return file.name, lambda module, rank: alpha / (rank or 1)


def _from_metadata(path: Path, metadata: Mapping[str, object]) -> FoundAlpha | None:
    if PEFT_METADATA not in metadata:
        return None
    config = _object(path, metadata[PEFT_METADATA])
    return f"metadata {PEFT_METADATA}", _peft(config, f"{path}: {PEFT_METADATA}")


def _adapter_config(path: Path) -> Path:
    return path.with_name("adapter_config.json")


def _from_adapter_config(path: Path, metadata: Mapping[str, object]) -> FoundAlpha | None:
    file = _adapter_config(path)
    return (file.name, _peft(read_json(file, ConfigError), str(file))) if file.is_file() else None


SIDECAR = AlphaSource(_from_sidecar, sidecar)
METADATA = AlphaSource(_from_metadata, for_all=True)
ADAPTER_CONFIG = AlphaSource(_from_adapter_config, _adapter_config)


def _peft(config: Mapping[str, object], source: str) -> Scale:
    """The scales of PEFT's config: of LoRA (`lora_alpha`), or of LoKr and LoHa (`alpha` and `r`)."""
    config = {key.removeprefix(_COMPONENT): value for key, value in config.items()}
    key = "lora_alpha" if "lora_alpha" in config else "alpha"
    if key not in config:
        return _one
    alpha_of = _by_pattern(config, source, key, "alpha_pattern")
    rank_of = _by_pattern(config, source, "r", "rank_pattern") if key == "alpha" else None
    root = bool(config.get("use_rslora")) and key == "lora_alpha"

    def scale(module: str, rank: int | None) -> float:
        divisor = rank_of(module) if rank_of else float(rank or 1)
        if divisor <= 0:
            raise ConfigError(f"{source}: r = {divisor:g} must be above 0")
        return alpha_of(module) / (math.sqrt(divisor) if root else divisor)

    return scale


def _by_pattern(config: Mapping[str, object], source: str, key: str, pattern_key: str) -> Callable[[str], float]:
    """The number of a module: of the first pattern that fits its name, else the one under `key`."""
    default, patterns = config.get(key), config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"{source}: {pattern_key} is not an object of modules and numbers")
    try:
        known = [(re.compile(rf"(.*\.)?({pattern})"), number) for pattern, number in patterns.items()]
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{source}: {pattern_key} has a pattern that cannot be read: {error}") from error

    def number(module: str) -> float:
        names = (module, f"{_COMPONENT}{module}")  # PEFT's names have the name of the model if it wraps a pipeline
        found = (value for pattern, value in known if any(map(pattern.fullmatch, names)))
        return _number(source, key, next(found, default))

    return number


def _object(path: Path, value: object) -> dict[str, object]:
    try:
        data = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: metadata {PEFT_METADATA} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path}: metadata {PEFT_METADATA} is not a JSON object")
    return data


def _number(source: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ConfigError(f"{source}: {key} = {value!r} is not a number below {LARGEST:g}")
    return float(value)
