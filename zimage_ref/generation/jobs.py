"""Turns the options of pictures into requests: all choices are made and all pictures are read before any weights.

Two things decide options that you leave out. The checkpoint's scheduler decides steps, guidance and shift, because it
shows whether the model is Turbo or the base model. The picture to start from decides the size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from zimage_ref.bounds import PICTURE
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array
from zimage_ref.model.config import SchedulerConfig
from zimage_ref.model.flow import sigmas, starting_noise
from zimage_ref.pictures.images import Picture, black_and_white, fit, fit_mask, flat, read_given

from .caching import idle_remark
from .config import IMAGE_STRENGTH, MASK_STRENGTH, GenerateConfig, config_of
from .control import Control
from .presets import defaults_for
from .samplers import Guidance
from .sizes import DEFAULT_SIDE, check_area, shrunk
from .steering import check_steering, check_words
from .tiles import Tiles
from .upscale import STRENGTH, TILE_SIZE, enlarged, only_enlarges


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    config: GenerateConfig  # all options decided; None remains only if there is no picture to start from
    width: int  # pixels
    height: int
    sigmas: tuple[float, ...]  # from the first noise level down to 0
    guidance: Guidance
    shape: tuple[int, int, int]  # of the latents: C, h, w
    picture: Picture | None  # the picture to start from, at the size of the result
    mask: Array | None  # (height, width) boolean, True: to be painted again
    given_noise: Array | None = None  # (C, h, w) float32, instead of the noise of the seed
    digests: Mapping[str, str] = field(
        default_factory=dict
    )  # SHA-256 of the files of pictures, by field; `Control.digests`
    control: Control | None = None  # the ControlNet and the map to follow
    tile: int | None = None  # the largest side of a tile, in latents; None: the picture is computed whole
    second: Request | None = None  # the second pass, which enlarges the picture; see `begun_from`
    remarks: tuple[str, ...] = ()  # on what is not used, of these files or of the options

    @property
    def noise(self) -> Array:
        """The noise to start from, (C, h, w) float32. It is made when it is asked for: a run may have many requests."""
        return starting_noise(self.config.seed, self.shape) if self.given_noise is None else self.given_noise

    @property
    def result(self) -> Request:
        """The last pass."""
        return self.second or self

    @property
    def passes(self) -> tuple[Request, ...]:
        """The passes, one or two."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def tiles(self) -> Tiles:
        """The parts that the networks see one at a time."""
        return Tiles.of(*self.shape[1:], self.tile)

    def begun_from(self, picture: Picture, config: GenerateConfig) -> Request:
        """This second pass for the `picture` that the first has made by `config`."""
        own = replace(config, variety=None, variety_until=None)  # variety is for a picture that begins
        return replace(self, config=own, picture=fit(picture, self.width, self.height, "crop"))

    def latent_mask(self, h: int, w: int) -> Array | None:
        """The mask for latents, (h, w) float32: 1 if any pixel of a latent is to be painted again, else 0."""
        if self.mask is None:
            return None
        rows, columns = (side // cells for side, cells in zip(self.mask.shape, (h, w), strict=True))
        return np.asarray(self.mask.reshape(h, rows, w, columns).any(axis=(1, 3)), np.float32)

    def batches_with(self, other: Request) -> bool:
        """Whether both can be denoised in one batch: only their prompts and their noise may differ."""
        return _wordless(self.config) == _wordless(other.config)


def configs_for(
    prompt: str | Sequence[str], seed: int | Sequence[int], options: Mapping[str, object]
) -> list[GenerateConfig]:
    """A config for each prompt; config i has the seed `seed` + i. With a list of seeds: for each prompt and each seed.

    options: the other fields of GenerateConfig, by name. Raises ConfigError for values out of bounds.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    for one in seed if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed]:
        PICTURE["seed"].check("seed", one)
    if isinstance(seed, Sequence):
        pairs = [(text, one) for text in prompts for one in seed]
    else:
        pairs = [(text, seed + i) for i, text in enumerate(prompts)]
    return [config_of({"prompt": text, "seed": one, **options}) for text, one in pairs]


def plan_requests(configs: Sequence[GenerateConfig], folder: ModelFolder) -> list[Request]:
    """The request for each of `configs`, with the model in `folder`.

    Raises ConfigError if options do not fit the model or each other, DatasetError if a picture cannot be read.
    """
    if not configs:
        raise ConfigError("at least one prompt is needed")
    requests: list[Request] = []
    for i, config in enumerate(configs):
        if i and _wordless(config) == _wordless(configs[i - 1]):  # the same picture is read and encoded only once
            last = requests[-1]
            words = {name: getattr(config, name) for name in _WORDS}
            own = replace(last.config, **words)
            check_words(own)
            requests.append(replace(last, config=own))
        else:
            requests.append(_request(config, folder))
    return requests


def in_batches(requests: Sequence[Request], size: int) -> Iterator[range]:
    """Batches of requests as ranges of their indices, from 0, in order. A batch has at most `size` requests."""
    start = 0
    for place in range(1, len(requests) + 1):
        full = place - start == size
        if place == len(requests) or full or not requests[start].batches_with(requests[place]):
            yield range(start, place)
            start = place


_WORDS = ("prompt", "negative_prompt", "original_prompt", "seed")  # what pictures of one batch may differ in


def _wordless(config: GenerateConfig) -> GenerateConfig:
    return replace(config, prompt="", negative_prompt="", original_prompt=None, seed=0)


def _size(config: GenerateConfig, picture: Picture | None) -> tuple[int, int]:
    """Width and height: as asked, else from the shape of `picture`, else the default."""
    width, height = config.width, config.height
    if picture is None:
        return width or DEFAULT_SIDE, height or DEFAULT_SIDE
    if width and not height:
        height = shrunk(width, width * picture.height / picture.width)[1]
    elif height and not width:
        width = shrunk(height * picture.width / picture.height, height)[0]
    return (width, height) if width and height else shrunk(*picture.size)


def _request(config: GenerateConfig, folder: ModelFolder) -> Request:
    sources = {"init_image": config.init_image, "mask": config.mask, "control_image": config.control_image}
    given = {name: read_given(source) for name, source in sources.items() if source is not None}
    picture = flat(given["init_image"].picture) if "init_image" in given else None
    white = None if "mask" not in given or picture is None else _mask(given["mask"].picture, config, picture)
    followed = flat(given["control_image"].picture) if "control_image" in given else None
    width, height = _size(config, picture or followed)
    _check_size(width, height, folder)
    config = replace(_decided(config, folder.scheduler), width=width, height=height)
    check_steering(config, height // folder.size_multiple, width // folder.size_multiple)
    painted = None if white is None else fit_mask(white, width, height, config.fit)
    if painted is not None and not painted.any():
        raise ConfigError(f"`mask` {_named(config.mask)} is black: paint the parts to change white")
    control = Control.of(config, followed, folder)
    request = Request(
        config=config,
        width=width,
        height=height,
        sigmas=_sigmas(config, folder, width * height, config.strength),
        guidance=Guidance(config.guidance or 0.0, config.cfg_normalization, config.cfg_truncation),
        shape=_shape(folder, width, height),
        picture=None if picture is None else fit(picture, width, height, config.fit),
        mask=painted,
        control=control,
        digests={name: each.digest for name, each in given.items()} | (control.digests if control else {}),
        remarks=tuple(remark for each in given.values() for remark in each.remarks),
    )
    if config.upscale is not None:
        request = _with_upscale(request, folder, picture, followed)
    idle = [remark for each in request.passes for remark in idle_remark(config, each.sigmas)]
    return replace(request, remarks=(*request.remarks, *idle))


def _with_upscale(request: Request, folder: ModelFolder, picture: Picture | None, followed: Picture | None) -> Request:
    """`request` with its second pass, or the second pass alone if `picture`, the one to start from, is only enlarged.

    followed: the picture that a ControlNet follows; without one, it acts in the second pass and follows the picture.
    """
    config, control = request.config, request.control
    width, height = enlarged(request.width, request.height, config.upscale or 1.0, folder.size_multiple)
    side = config.tile_size or TILE_SIZE
    tile_width, tile_height = min(width, side), min(height, side)
    _check_size(tile_width, tile_height, folder)
    second = replace(
        request,
        width=width,
        height=height,
        sigmas=_sigmas(config, folder, tile_width * tile_height, config.upscale_strength),
        shape=_shape(folder, width, height),
        mask=None,
        control=control and control.following(followed, width, height, config.fit),
        tile=side // folder.vae.factor,
    )
    if only_enlarges(config) and picture is not None:
        return replace(second, picture=fit(picture, width, height, config.fit))
    return replace(request, second=replace(second, picture=None), control=control if followed else None)


def _shape(folder: ModelFolder, width: int, height: int) -> tuple[int, int, int]:
    """That of the latents of a picture."""
    return folder.transformer.in_channels, height // folder.vae.factor, width // folder.vae.factor


def _decided(config: GenerateConfig, scheduler: SchedulerConfig) -> GenerateConfig:
    """`config` with steps, guidance and strengths decided. Raises ConfigError if options do not fit each other."""
    defaults, strength = defaults_for(scheduler), config.strength
    if config.upscale is not None:
        own = config.upscale_strength or STRENGTH
        config = replace(config, upscale_strength=own, tile_size=config.tile_size or TILE_SIZE)
    if strength is None and config.init_image is not None and not only_enlarges(config):
        strength = IMAGE_STRENGTH if config.mask is None else MASK_STRENGTH
    return replace(
        config,
        steps=defaults.steps if config.steps is None else config.steps,
        guidance=defaults.guidance if config.guidance is None else config.guidance,
        strength=strength,
    )


def _mask(mask: Picture, config: GenerateConfig, picture: Picture) -> Picture:
    if mask.size != picture.size:
        raise ConfigError(
            f"`mask` {_named(config.mask)} is {mask.width} x {mask.height}, `init_image` {_named(config.init_image)} "
            f"{picture.width} x {picture.height}: they must be of one size"
        )
    return black_and_white(mask)


def _named(source: object) -> str:
    return "(a picture in memory)" if isinstance(source, Picture) else str(source)


def _check_size(width: int, height: int, folder: ModelFolder) -> None:
    multiple = folder.size_multiple
    longest = multiple * min(folder.transformer.axes_lens[1:])
    for side in (width, height):
        if side % multiple:
            raise ConfigError(f"width and height must be multiples of {multiple} for {folder.path}, not {side}")
        if side > longest:
            raise ConfigError(f"width and height must be at most {longest} for {folder.path}, not {side}")
    check_area(width, height)


def _sigmas(config: GenerateConfig, folder: ModelFolder, pixels: int, share: float | None) -> tuple[float, ...]:
    """The noise levels of a pass that sees `pixels` pixels at a time. share: its strength; None is 1."""
    scheduler = folder.scheduler
    if config.shift is not None:
        scheduler = replace(scheduler, shift=config.shift, use_dynamic_shifting=False)
    steps, strength = config.steps or defaults_for(scheduler).steps, 1.0 if share is None else share
    schedule = sigmas(steps, scheduler, pixels // folder.size_multiple**2, strength, config.spacing)
    if len(schedule) < 2:
        raise ConfigError(f"`strength` {strength:g} leaves none of {steps} steps: give a higher one")
    return tuple(schedule)
