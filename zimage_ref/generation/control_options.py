"""The options of a ControlNet: how one names it, its scale, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from zimage_ref.bounds import CONTROL_SCALE
from zimage_ref.errors import ConfigError
from zimage_ref.options import path_and_scale
from zimage_ref.pictures.maps import KINDS

# fields of GenerateConfig
CONTROL_FIELDS = ("control", "control_image", "control_kind", "control_start", "control_end")
_GIVEN = ("depth", "pose", "hed", "mlsd", "scribble", "tile")  # maps that other programs make


class ControlConfig(Protocol):
    """The fields of GenerateConfig that a ControlNet needs."""

    @property
    def control(self) -> str | None: ...
    @property
    def control_image(self) -> object: ...
    @property
    def control_kind(self) -> str: ...
    @property
    def control_start(self) -> float: ...
    @property
    def control_end(self) -> float: ...
    @property
    def upscale(self) -> float | None: ...


def check_control(config: ControlConfig) -> None:
    """Raises ConfigError unless the options of a ControlNet fit each other."""
    if config.control_kind in _GIVEN:
        raise ConfigError(
            f"`control_kind` {config.control_kind}: this map is not made here: give one that is ready as "
            f"`control_image`, and leave out `control_kind`"
        )
    if config.control is None:
        given = {
            "control_image": config.control_image is not None, "control_kind": config.control_kind != KINDS[0],
            "control_start": config.control_start != 0, "control_end": config.control_end != 1,
        }  # fmt: skip
        for name, needs in given.items():
            if needs:
                raise ConfigError(f"`{name}` needs `control`")
        return
    if config.control_image is None and config.upscale is None:
        raise ConfigError("`control` needs `control_image`")
    if config.control_start >= config.control_end:
        raise ConfigError(
            f"`control_start` {config.control_start:g} must be below `control_end` {config.control_end:g}"
        )
    control_and_scale(config.control)


def control_and_scale(text: str) -> tuple[Path, float]:
    """The path and the scale in `text`, PATH or PATH:SCALE. Raises ConfigError for a scale out of bounds."""
    path, scale = path_and_scale(text, "ControlNet")
    if fault := CONTROL_SCALE.fault(scale):
        raise ConfigError(f"{path}: ControlNet scale {scale:g} {fault}")
    return path, scale


def with_control(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with a control of [(path, picture, scale)] as the fields of GenerateConfig.

    Raises ConfigError if it is not one triple: a picture follows one ControlNet.
    """
    given = options.get("control")
    if given is None or isinstance(given, str):
        return dict(options)
    if isinstance(given, Path):
        return {**options, "control": str(given)}
    if not isinstance(given, Sequence) or len(given) != 1 or len(given[0]) != 3:
        raise ConfigError("`control` must be one ControlNet: [(path, picture, scale)]")
    path, picture, scale = given[0]
    return {**options, "control": f"{path}:{float(scale)!r}", "control_image": picture}
