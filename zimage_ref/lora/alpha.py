"""The strength of a LoRA whose file has no alpha keys: it is in the metadata or in a JSON file beside the LoRA.

scale = alpha / rank          alpha / sqrt(rank) with PEFT's use_rslora
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


def _one(module: str, rank: int) -> float:
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
    return file.name, lambda module, rank: alpha / rank


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
METADATA = AlphaSource(_from_metadata)
ADAPTER_CONFIG = AlphaSource(_from_adapter_config, _adapter_config)


def _peft(config: Mapping[str, object], source: str) -> Scale:
    config = {key.removeprefix(_COMPONENT): value for key, value in config.items()}
    if "lora_alpha" not in config:
        return _one
    default, patterns = config["lora_alpha"], config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"{source}: alpha_pattern is not an object of modules and alphas")
    try:
        known = [(re.compile(rf"(.*\.)?({pattern})"), alpha) for pattern, alpha in patterns.items()]
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{source}: alpha_pattern has a pattern that cannot be read: {error}") from error

    def scale(module: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in known if pattern.fullmatch(module)), default)
        return _number(source, "lora_alpha", alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


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
