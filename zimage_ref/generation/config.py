"""The options of a picture. Each is defined once, with its default, type, help text and bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zimage_ref.errors import ConfigError
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, OFFICIAL_VAE, size_multiple
from zimage_ref.options import at_least, at_most, one_of, option, required
from zimage_ref.pictures.images import FITS, PictureSource

from .samplers import SAMPLERS

SIDE_MULTIPLE = size_multiple(OFFICIAL_TRANSFORMER, OFFICIAL_VAE)  # 16: 8 pixels a latent, 2 x 2 latents a token
DEFAULT_SIDE = 512
MAX_AREA = 2048 * 2048  # pixels


@dataclass(frozen=True)
class Defaults:
    """The values of options that the model decides."""

    steps: int
    guidance: float
    preview_steps: int  # during training: the picture is nearly the same, and sooner there


TURBO = Defaults(steps=8, guidance=0.0, preview_steps=8)  # README of Tongyi-MAI/Z-Image


BASE = Defaults(steps=50, guidance=4.0, preview_steps=30)


IMAGE_STRENGTH, MASK_STRENGTH = 0.6, 1.0  # defaults of diffusers' img2img and inpaint pipelines


def by_model(name: str) -> str:
    """The defaults of the option `name` for both models, in words."""
    return f"{getattr(TURBO, name):g} for Turbo, {getattr(BASE, name):g} for the base model"


@dataclass(frozen=True)
class GenerateConfig:
    """The options of one picture. None: the model or the given picture decides; see `jobs`.

    Raises ConfigError for values out of bounds, and for options that need `init_image` if there is none.
    """

    prompt: str = required("what the picture shows")
    negative_prompt: str = option("", "what it should not show; needs guidance")
    width: int | None = option(
        None, f"pixels, a multiple of {SIDE_MULTIPLE}, or auto: that of `init_image`, else {DEFAULT_SIDE}"
    )
    height: int | None = option(None, "as `width`; the shape of `init_image` decides where only one is given")
    steps: int | None = option(None, f"denoising steps (auto: {by_model('steps')})")
    guidance: float | None = option(
        None,
        f"classifier-free guidance, 0 is none (auto: {by_model('guidance')})",
    )
    shift: float | None = option(
        None, "shift of the noise levels (auto: the checkpoint's, 3 for Turbo, 6 for the base)"
    )
    sampler: str = option("euler", f"one of {', '.join(SAMPLERS)}")
    cfg_normalization: float = option(0.0, "longest that guidance may make a prediction, 1 is no longer; 0: no limit")
    cfg_truncation: float = option(1.0, "part of the way, 0 to 1, after which there is no guidance")
    seed: int = option(0, "seed of the starting noise")
    init_image: PictureSource | None = option(None, "picture to start from")
    strength: float | None = option(
        None,
        f"how much of `init_image` to change, 1 is all (auto: {IMAGE_STRENGTH:g}, with `mask` {MASK_STRENGTH:g})",
    )
    mask: PictureSource | None = option(None, "black and white picture the size of `init_image`: white is painted anew")
    fit: str = option(
        "crop", f"how `init_image` comes to another shape: {', '.join(FITS)} (with `mask`: to be painted)"
    )

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        _check_text("negative_prompt", self.negative_prompt)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                check_side(name, getattr(self, name))
        if self.width and self.height:
            check_area(self.width, self.height)
        at_least(self, 1, "steps")
        at_least(self, 0, "seed", "guidance", "cfg_normalization", "cfg_truncation", "strength")
        at_most(self, 1, "cfg_truncation", "strength")
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise ConfigError(f"`shift` {self.shift} must be above 0")
        one_of(self, "sampler", SAMPLERS)
        one_of(self, "fit", FITS)
        if self.init_image is None:
            needs_picture = {
                "strength": self.strength is not None, "mask": self.mask is not None, "fit": self.fit != "crop"
            }  # fmt: skip
            for name, given in needs_picture.items():
                if given:
                    raise ConfigError(f"`{name}` needs `init_image`")

    def check_guidance(self) -> None:
        """Raises ConfigError if you set an option that needs guidance while `guidance` is 0 or None."""
        idle = {
            "negative_prompt": bool(self.negative_prompt),
            "cfg_normalization": bool(self.cfg_normalization),
            "cfg_truncation": self.cfg_truncation < 1,
        }
        for name, given in idle.items():
            if given and not self.guidance:
                raise ConfigError(f"`{name}` does nothing without guidance: give `guidance` above 0")


def config_of(options: Mapping[str, Any]) -> GenerateConfig:
    """The config with the fields `options`.

    Raises ConfigError for values out of bounds, TypeError for a name that is not a field.
    """
    return GenerateConfig(**options)


def check_side(name: str, side: int) -> None:
    """Raises ConfigError unless `side` is a positive multiple of SIDE_MULTIPLE."""
    if side < SIDE_MULTIPLE or side % SIDE_MULTIPLE:
        nearest = max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE)
        raise ConfigError(f"`{name}` {side} must be a multiple of {SIDE_MULTIPLE}: {nearest} is the nearest")


def check_area(width: int, height: int) -> None:
    """Raises ConfigError if width times height is above MAX_AREA."""
    if width * height > MAX_AREA:
        raise ConfigError(
            f"{width} x {height} is more than 2048 x 2048 pixels: {' x '.join(map(str, shrunk(width, height)))} fits"
        )


def shrunk(width: float, height: float) -> tuple[int, int]:
    """The largest size of the shape width : height, at most as asked and at most MAX_AREA, in whole SIDE_MULTIPLEs."""
    scale = min(1.0, math.sqrt(MAX_AREA / (width * height)))
    sides = (round(side * scale / SIDE_MULTIPLE) * SIDE_MULTIPLE for side in (width, height))
    w, h = (max(SIDE_MULTIPLE, side) for side in sides)
    while w * h > MAX_AREA:  # rounding up both sides can exceed it
        w, h = (w - SIDE_MULTIPLE, h) if w >= h else (w, h - SIDE_MULTIPLE)
    return w, h


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the command line was in another encoding
        raise ConfigError(f"`{name}` is not valid Unicode: {error.reason}") from error
