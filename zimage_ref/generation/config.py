"""The options of a picture. Each is defined once, with its default, type, help text and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_ref.bounds import PICTURE as PICTURE_BOUNDS
from zimage_ref.bounds import check_bounds
from zimage_ref.errors import ConfigError
from zimage_ref.model.spacings import SPACINGS
from zimage_ref.options import Group, check_choices, option, required
from zimage_ref.pictures.images import FITS, Picture, PictureSource
from zimage_ref.pictures.maps import KINDS

from .caching import INTERVAL, MIN_STEPS, THRESHOLD, check_cache
from .control_options import check_control, with_control
from .presets import by_model
from .samplers import SAMPLERS
from .sizes import DEFAULT_SIDE, SIDE_MULTIPLE, check_area, check_side, parse_size
from .upscale import STRENGTH, TILE_SIZE, check_upscale

VARIETY_UNTIL = 0.2  # of the steps
IMAGE_STRENGTH, MASK_STRENGTH = 0.6, 1.0  # defaults of diffusers' img2img and inpaint pipelines


class GenerateGroup(Group):
    """The groups of options of `zimage generate`."""

    MODEL = "Model"
    PICTURE = "Prompt and size"
    DENOISING = "Denoising"
    START = "Start from a picture"
    CONTROL = "Follow a picture"
    UPSCALE = "Enlarge a picture"
    OUTPUT = "Output"
    RECORD = "Make a picture again"
    SPEED = "Memory and engine"


MODEL, PICTURE, DENOISING, START, CONTROL, UPSCALE, _, _, _ = GenerateGroup


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
        auto=True,
    )
    height: int | None = option(
        None,
        "Height in pixels, as `width`. If you give only one of them, `init_image` decides the other.",
        PICTURE,
        auto=True,
    )
    steps: int | None = option(
        None, f"Denoising steps. With auto, {by_model('steps')}.", DENOISING, essential=True, auto=True
    )
    guidance: float | None = option(
        None,
        "Strength of classifier-free guidance. 0 is none. The cfg of ComfyUI is one more. "
        f"With auto, {by_model('guidance')}.",
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
    spacing: str = option(
        "simple", "How the noise levels are spaced between the first and the last.", DENOISING, choices=SPACINGS,
        late=True,
    )  # fmt: skip
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
    original_prompt: str | None = option(
        None, "Prompt that `prompt` was written from, for the record.", PICTURE, value="TEXT"
    )
    cache: str | None = option(
        None,
        "Step cache: many steps use what the layers added in an earlier step, which takes less time. "
        f"first-block:{THRESHOLD:g} says how much may differ, taylor:{INTERVAL} how far computed steps are apart. "
        "mag follows the length of what is added.",
        DENOISING,
        value="NAME[:X]",
    )
    cache_min_steps: int | None = option(
        None, f"The fewest steps with which `cache` acts. With auto, {MIN_STEPS}.", DENOISING, auto=True
    )
    seed: int = option(0, "Seed of the noise at the start.", PICTURE)
    lora_scale: float = option(1.0, "Factor on the strength of every LoRA.", MODEL)
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
    )
    control_image: PictureSource | None = option(
        None, "Picture to follow. It is fitted as `fit` says.", CONTROL, value="PICTURE"
    )
    control_kind: str = option(
        KINDS[0], "Map to make from `control_image`. With none, the picture is a map already.", CONTROL, choices=KINDS
    )
    control_start: float = option(0.0, "Share of the steps after which the ControlNet begins to act.", CONTROL)
    control_end: float = option(1.0, "Share of the steps after which it no longer acts.", CONTROL)
    upscale: float | None = option(
        None,
        "Factor on both sides, such as 2: a second pass enlarges the picture and adds details. "
        "`init_image` without `strength` is enlarged as it is.",
        UPSCALE,
        value="X",
    )
    upscale_strength: float | None = option(
        None, f"How much the second pass changes, 0 to 1. With auto, {STRENGTH:g}.", UPSCALE, auto=True
    )
    tile_size: int | None = option(
        None,
        "Side in pixels of the tiles of the second pass. A picture that fits in one is not cut. "
        f"With auto, {TILE_SIZE}.",
        UPSCALE,
        auto=True,
    )

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        _check_text("negative_prompt", self.negative_prompt)
        _check_text("original_prompt", self.original_prompt or "")
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
        check_cache(self)
        check_upscale(self)
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
    """The config with the fields `options`. An option `size` such as "3:4" stands for width and height.

    Raises ConfigError for values out of bounds, TypeError for a name that is not a field.
    """
    fields = with_control(options)
    if (size := fields.pop("size", None)) is not None:
        fields["width"], fields["height"] = parse_size(str(size), fields.get("width"), fields.get("height"))
    return GenerateConfig(**fields)


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
