"""The options of the second pass, and the sizes that follow from them.

The second pass enlarges a picture by Lanczos, then denoises it again from a low noise level, in tiles if it is large.
"""

from __future__ import annotations

from typing import Protocol

from zimage_ref.errors import ConfigError

from .sizes import check_area, check_side

STRENGTH = 0.33  # the share of the noise that the second pass adds and takes away
TILE_SIZE = 1024  # pixels: the memory of an ordinary picture


class UpscaleConfig(Protocol):
    """The fields of GenerateConfig that the second pass needs."""

    @property
    def upscale(self) -> float | None: ...
    @property
    def upscale_strength(self) -> float | None: ...
    @property
    def tile_size(self) -> int | None: ...
    @property
    def init_image(self) -> object: ...
    @property
    def strength(self) -> float | None: ...
    @property
    def mask(self) -> object: ...


def check_upscale(config: UpscaleConfig) -> None:
    """Raises ConfigError unless the options of the second pass fit each other."""
    if config.upscale is None:
        for name in ("upscale_strength", "tile_size"):
            if getattr(config, name) is not None:
                raise ConfigError(f"`{name}` needs `upscale`")
    if config.tile_size is not None:
        check_side("tile_size", config.tile_size)
        check_area(config.tile_size, config.tile_size)


def only_enlarges(config: UpscaleConfig) -> bool:
    """Whether the picture to start from is enlarged as it is, without a first pass."""
    return bool(config.upscale and config.init_image is not None and config.strength is None and config.mask is None)


def enlarged(width: int, height: int, factor: float, multiple: int) -> tuple[int, int]:
    """The sides `factor` times as long, rounded to multiples of `multiple`."""
    long, high = (round(side * factor / multiple) * multiple for side in (width, height))
    return long, high
