"""Where the strength of a LoRA is written when the file has no alpha keys: metadata, or a JSON file beside it.

scale = alpha / rank          alpha / sqrt(rank) with PEFT's use_rslora
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats.json_file import read_json

from .updates import LARGEST

PEFT_METADATA = "lora_adapter_metadata"
_COMPONENT = "transformer."  # diffusers prefixes each of PEFT's keys with the model it belongs to

Scale = Callable[[str, int], float]  # module, rank -> scale


def sidecar(path: Path) -> Path:
    """The file beside a LoRA in which z-image-train keeps rank, alpha and targets."""
    return path.with_suffix(".lora.json")


def companions(path: Path) -> tuple[Path, Path]:
    """The files beside a LoRA that may hold its alpha: z-image-train's and PEFT's."""
    return sidecar(path), path.with_name("adapter_config.json")


def scales(path: Path, prefix: str, style: str, metadata: Mapping[str, Any]) -> tuple[str, Scale]:
    """Where the alpha of a file without alpha keys comes from, and the scale of each module.

    Raises FormatError or ConfigError where the source is there but says nothing sensible.
    """
    if style == "lora_a/b":
        return sidecar(path).name, _z_image_train(path)
    if style == "lora_A/B" and PEFT_METADATA in metadata:
        return f"metadata {PEFT_METADATA}", _peft(_object(path, metadata[PEFT_METADATA]), f"{path}: {PEFT_METADATA}")
    beside = companions(path)[1]
    if prefix == "base_model.model." and beside.is_file():
        return beside.name, _peft(read_json(beside, ConfigError), str(beside))
    if metadata.get("alpha_folded") in (True, "true"):
        return "metadata: multiplied into B already", lambda module, rank: 1.0
    return "default: alpha = rank", lambda module, rank: 1.0


def _z_image_train(path: Path) -> Scale:
    file = sidecar(path)
    if not file.is_file():
        raise FormatError(
            f"{path}: the strength of this LoRA is in {file.name}, which is not beside it; if it is lost, "
            'make one that says {"alpha": N}, where N is the rank for a strength of 1'
        )
    data = read_json(file, ConfigError)
    if data.get("alpha_folded"):
        return lambda module, rank: 1.0
    alpha = _number(str(file), "alpha", data.get("alpha"))
    return lambda module, rank: alpha / rank


def _peft(config: Mapping[str, Any], source: str) -> Scale:
    config = {key.removeprefix(_COMPONENT): value for key, value in config.items()}
    if "lora_alpha" not in config:
        return lambda module, rank: 1.0
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


def _object(path: Path, value: Any) -> dict[str, Any]:
    try:
        data = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: metadata {PEFT_METADATA} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path}: metadata {PEFT_METADATA} is not a JSON object")
    return data


def _number(source: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ConfigError(f"{source}: {key} = {value!r} is not a number below {LARGEST:g}")
    return float(value)
