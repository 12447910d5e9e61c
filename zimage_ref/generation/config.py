"""The options of a picture. Each is defined once, with its default, type, help text and bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_ref.bounds import PICTURE as PICTURE_BOUNDS
from zimage_ref.bounds import check_bounds
from zimage_ref.errors import ConfigError
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, OFFICIAL_VAE, size_multiple
from zimage_ref.options import Group, check_choices, option, required
from zimage_ref.pictures.images import FITS, Picture, PictureSource
from zimage_ref.pictures.maps import KINDS

from .control_options import check_control, with_control
from .samplers import SAMPLERS

SIDE_MULTIPLE = size_multiple(OFFICIAL_TRANSFORMER, OFFICIAL_VAE)  # 16: 8 pixels a latent, 2 x 2 latents a token
DEFAULT_SIDE = 512
VARIETY_UNTIL = 0.2  # of the steps
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


class GenerateGroup(Group):
    """The groups of options of `zimage generate`."""

    MODEL = "Model"
    PICTURE = "Prompt and size"
    DENOISING = "Denoising"
    START = "Start from a picture"
    CONTROL = "Follow a picture"
    OUTPUT = "Output"
    RECORD = "Make a picture again"
    SPEED = "Memory and engine"


_, PICTURE, DENOISING, START, CONTROL, _, _, _ = GenerateGroup


@dataclass(frozen=True)
class GenerateConfig:
    """The options of one picture. None: the model or the given picture decides; see `jobs`.

    Raises ConfigError for values out of bounds, and for options that need `init_image` if there is none.
    """

    prompt: str = required("Text that describes the picture.", PICTURE)
    negative_prompt: str = option(
        "", "Text that describes the things to avoid. It needs guidance or `nag`.", PICTURE, value="TEXT"
    )
    region: tuple[str, ...] = option(
        (),
        "A part of the picture and its own prompt. The sides are shares of the picture, 0 to 1. "
        "You can repeat this option.",
        PICTURE,
        value="LEFT,TOP,WIDTH,HEIGHT: TEXT",
        repeatable=True,
    )
    width: int | None = option(
        None,
        f"Width in pixels, a multiple of {SIDE_MULTIPLE}. With auto, that of `init_image` or `control_image`, "
        f"or {DEFAULT_SIDE}.",
        PICTURE,
        essential=True,
        auto=True,
    )
    height: int | None = option(
        None,
        "Height in pixels, as `width`. If you give only one of them, `init_image` decides the other.",
        PICTURE,
        essential=True,
        auto=True,
    )
    steps: int | None = option(
        None, f"Denoising steps. With auto, {by_model('steps')}.", DENOISING, essential=True, auto=True
    )
    guidance: float | None = option(
        None,
        f"Strength of classifier-free guidance. 0 is none. With auto, {by_model('guidance')}.",
        DENOISING,
        essential=True,
        auto=True,
    )
    shift: float | None = option(
        None,
        "Shift of the noise levels. With auto, the checkpoint's: 3 for Turbo, 6 for the base model.",
        DENOISING,
        auto=True,
    )
    sampler: str = option("euler", "How a step is computed.", DENOISING, choices=SAMPLERS)
    cfg_normalization: float = option(
        0.0,
        "Limit on the norm of the guided prediction, as a multiple of the norm without guidance. 0 sets no limit.",
        DENOISING,
    )
    cfg_truncation: float = option(
        1.0, "Time at which guidance ends: 0 is the start of denoising, 1 is its end.", DENOISING
    )
    nag: float | None = option(
        None,
        "Strength of `negative_prompt` without guidance. 1 is no change; 3 to 8 are usual. A step takes longer.",
        DENOISING,
        value="SCALE",
    )
    variety: float | None = option(
        None, "How much pictures of one prompt differ, 0 to 1: noise on the prompt in the first steps.", DENOISING
    )
    variety_until: float | None = option(
        None, f"Share of the steps with `variety`. With auto, {VARIETY_UNTIL:g}.", DENOISING, auto=True
    )
    seed: int = option(0, "Seed of the noise at the start.", PICTURE)
    init_image: PictureSource | None = option(None, "Picture to start from.", START, value="PICTURE", essential=True)
    strength: float | None = option(
        None,
        f"How much of `init_image` changes, 0 to 1. With auto, {IMAGE_STRENGTH:g}, or {MASK_STRENGTH:g} "
        f"if there is a `mask`.",
        START,
        essential=True,
        auto=True,
    )
    mask: PictureSource | None = option(
        None,
        "Black and white picture of the same size as `init_image`. The white part is painted anew.",
        START,
        value="PICTURE",
    )
    fit: str = option(
        "crop",
        "How `init_image` is changed to another shape. With a `mask`, the edges that pad adds are painted.",
        START,
        choices=FITS,
    )
    control: str | None = option(
        None,
        "ControlNet, a file or folder, with a strength if you want one. It makes the picture follow `control_image`.",
        CONTROL,
        value="FILE[:X]",
        essential=True,
    )
    control_image: PictureSource | None = option(
        None, "Picture to follow. It is fitted as `fit` says.", CONTROL, value="PICTURE", essential=True
    )
    control_kind: str = option(
        KINDS[0], "Map to make from `control_image`. With none, the picture is a map already.", CONTROL, choices=KINDS
    )
    control_start: float = option(0.0, "Share of the steps after which the ControlNet begins to act.", CONTROL)
    control_end: float = option(1.0, "Share of the steps after which it no longer acts.", CONTROL)

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        _check_text("negative_prompt", self.negative_prompt)
        object.__setattr__(self, "region", _texts("region", self.region))
        check_bounds(self, PICTURE_BOUNDS)
        for name in ("init_image", "mask", "control_image"):
            if not isinstance(getattr(self, name), str | Path | Picture | None):
                raise ConfigError(f"`{name}` must be a picture or the path of one")
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                check_side(name, getattr(self, name))
        if self.width and self.height:
            check_area(self.width, self.height)
        check_control(self)
        check_choices(self)
        if self.variety_until is not None and not self.variety:
            raise ConfigError("`variety_until` needs `variety`")
        if self.init_image is None:
            needs_picture = {
                "strength": self.strength is not None, "mask": self.mask is not None,
                "fit": self.fit != "crop" and self.control is None,
            }  # fmt: skip
            for name, given in needs_picture.items():
                if given:
                    raise ConfigError(f"`{name}` needs `init_image`")

    def check_guidance(self) -> None:
        """Raises ConfigError if you set an option that needs guidance while `guidance` is 0 or None."""
        idle = {
            "negative_prompt": bool(self.negative_prompt) and self.nag is None,
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
    return GenerateConfig(**with_control(options))


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


def _texts(name: str, texts: object) -> tuple[str, ...]:
    """`texts` as a tuple. Raises ConfigError unless they are a list of texts."""
    if not isinstance(texts, (list, tuple)):
        raise ConfigError(f"`{name}` must be a list of texts")
    for text in texts:
        _check_text(name, text)
    return tuple(texts)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"`{name}` must be a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the command line was in another encoding
        raise ConfigError(f"`{name}` is not valid Unicode: {error.reason}") from error
