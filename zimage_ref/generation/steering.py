"""What steers the pictures of a batch beside their prompts: NAG, variety, and prompts for regions.

Variety is noise on the features c of the captions of a picture, in its first steps:

    c' = c + variety std(c) m u        u uniform in [-1, 1), m is 0 or 1, both from the picture's seed

Sources: the seed variance enhancer of InvokeAI, with its strength as a share of std(c).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

import numpy as np

from zimage_ref.errors import ConfigError
from zimage_ref.memory import CAPTION_TOKENS
from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.steering import NAG_OFF, Box, Nag, Steering

from .caching import computed_share
from .config import VARIETY_UNTIL, GenerateConfig
from .samplers import TWICE

if TYPE_CHECKING:
    from .engine import ConditioningT, Engine
    from .jobs import Request

_REGION = re.compile(r"\s*(\S+?)\s*,\s*(\S+?)\s*,\s*(\S+?)\s*,\s*(\S+?)\s*:\s*(.*\S)\s*", re.DOTALL)
_VARIETY_STREAM = 1  # of random numbers, beside that of the noise
_NAG_SHARE = 0.16  # of the memory of a prediction: attention once more, 5 of the 32 widths of a block
_MASK_TOKENS = 1e-5  # a pair of tokens takes 3 bytes of masks, a token of the official model about 340 kB


@dataclass(frozen=True)
class Region:
    """A part of the picture with a prompt of its own."""

    box: Box
    prompt: str

    @classmethod
    def parse(cls, text: str) -> Region:
        """The region "LEFT,TOP,WIDTH,HEIGHT: PROMPT". Raises ConfigError for another form, or a box outside."""
        found = _REGION.fullmatch(text)
        try:
            sides = [float(number) for number in found.groups()[:4]] if found else []
        except ValueError:
            sides = []
        if not found or not sides:
            raise ConfigError(f"`region` {text!r} must be LEFT,TOP,WIDTH,HEIGHT: PROMPT, such as 0,0,0.5,1: a red fox")
        left, top, width, height = sides
        inside = min(left, top) >= 0 and min(width, height) > 0 and max(left + width, top + height) <= 1 + 1e-6
        if not inside:
            raise ConfigError(f"`region` {text!r} is not inside the picture: its sides are shares from 0 to 1")
        return cls(Box(left, top, width, height), found[5])


def regions_of(config: GenerateConfig) -> tuple[Region, ...]:
    """The regions of a picture. Raises ConfigError if one is not of their form."""
    return tuple(Region.parse(text) for text in config.region)


def uses_nag(config: GenerateConfig) -> bool:
    """Whether NAG changes the picture."""
    return config.nag is not None and config.nag != NAG_OFF


def check_steering(config: GenerateConfig, rows: int, columns: int) -> None:
    """Raises ConfigError if the options of `config`, all decided, do not fit each other or a grid of tokens."""
    for region in regions_of(config):
        if not region.box.cells(rows, columns).any():
            raise ConfigError(f"`region` {region.prompt!r} is smaller than a cell of 16 pixels: make it larger")
    check_words(config)


def check_words(config: GenerateConfig) -> None:
    """Raises ConfigError if NAG does not fit the texts and the guidance of `config`."""
    if config.nag is not None and not config.negative_prompt:
        raise ConfigError("`nag` needs `negative_prompt`")
    if uses_nag(config) and config.guidance:
        raise ConfigError("`nag` is for pictures without guidance: give `guidance` 0, or no `nag`")


def all_texts(configs: Iterable[GenerateConfig]) -> list[str]:
    """Every text that these pictures need encoded, once: the prompts first."""
    every = list(configs)
    negatives = [config.negative_prompt for config in every if config.guidance or uses_nag(config)]
    prompts = [text for config in every for text in prompts_of(config)]
    return list(dict.fromkeys([*prompts, *negatives]))


def prompts_of(config: GenerateConfig) -> list[str]:
    """The prompt of a picture, then those of its regions."""
    return [config.prompt, *(region.prompt for region in regions_of(config))]


def predictions_of(request: Request) -> float:
    """How many plain predictions of the transformer one step of this picture takes, in memory and about in time."""
    config, image = request.config, request.tiles.rows * request.tiles.columns // 4
    nag, prompts = uses_nag(config), prompts_of(config)
    tokens = image + CAPTION_TOKENS * (len(prompts) + nag)
    pairs = tokens**2 if len(prompts) > 1 else 0
    share = (tokens + _MASK_TOKENS * pairs) / (image + CAPTION_TOKENS)
    return (1 + (request.guidance.scale > 0)) * share * (1 + _NAG_SHARE * nag)


def passes_of(request: Request) -> int:
    """How many plain predictions of the transformer a pass takes in all, about in time.

    Those that a step cache spares are left out, if they are known before the work.
    """
    share = computed_share(request.config, request.sigmas)
    return round((1 if share is None else share) * predictions_in(request) * predictions_of(request))


def predictions_in(request: Request) -> int:
    """How often the transformer is asked in a pass: for each step of the sampler, and for each tile."""
    steps = len(request.sigmas) - 1
    return (2 * steps - 1 if request.config.sampler in TWICE else steps) * len(request.tiles.places)


@dataclass(frozen=True)
class Words(Generic[ArrayT]):
    """The features (T_i, cap_feat_dim) of the captions of B pictures, and how they steer."""

    positive: Sequence[ArrayT]  # 1 + n for each picture, if there are n regions
    negative: Sequence[ArrayT] = ()  # for guidance: as many as positive ones, or none
    varied: Sequence[ArrayT] = ()  # the positive ones with noise, used while sigma is above `until`
    until: float = math.inf
    steering: Steering[ArrayT] | None = None

    def conditioning(
        self, engine: Engine[ArrayT, ConditioningT], size: tuple[int, int], is_guided: bool, is_early: bool,
        tile: Box | None = None,
    ) -> ConditioningT:  # fmt: skip
        """The engine's conditioning for latents of `size` (h, w), those of a part `tile` of the pictures."""
        captions = [*(self.varied if is_early else self.positive), *(self.negative if is_guided else ())]
        steering = self.steering.seen_from(tile) if self.steering and tile else self.steering
        return engine.condition(captions, *size, steering)

    @property
    def depends_on_place(self) -> bool:
        """Whether the conditioning of a tile depends on its place."""
        return self.steering is not None and bool(self.steering.boxes)

    def is_early(self, sigma: float) -> bool:
        """Whether the features with noise are used at `sigma`."""
        return bool(self.varied) and sigma > self.until


def words_of(
    batch: Sequence[Request], captions: Mapping[str, ArrayT], engine: Engine[ArrayT, ConditioningT]
) -> Words[ArrayT]:
    """Those of requests that can be denoised together. captions: features by text."""
    first = batch[0].config
    texts = [prompts_of(request.config) for request in batch]
    negatives = [captions[r.config.negative_prompt] for r in batch if first.guidance or uses_nag(first)]
    nag = Nag(first.nag) if first.nag is not None and uses_nag(first) else None
    boxes = tuple(region.box for region in regions_of(first))
    steering = Steering(boxes, nag, negatives if nag else ()) if nag or boxes else None
    schedule = batch[0].sigmas
    until = first.variety_until if first.variety_until is not None else VARIETY_UNTIL
    varied = [
        with_noise(engine, captions[text], first.variety, r.config.seed, i)
        for r, own in zip(batch, texts, strict=True) for i, text in enumerate(own) if first.variety
    ]  # fmt: skip
    return Words(
        positive=[captions[text] for own in texts for text in own],
        negative=[negative for negative in negatives for _ in texts[0]] if first.guidance else (),
        varied=varied,
        until=schedule[math.ceil(until * (len(schedule) - 1))],
        steering=steering,
    )


def with_noise(engine: Engine[ArrayT, ConditioningT], caption: ArrayT, variety: float, seed: int, place: int) -> ArrayT:
    """Features (T, cap_feat_dim) with the noise of a seed. place: of the caption among those of its picture."""
    rng = np.random.default_rng([seed, _VARIETY_STREAM, place])
    noise = rng.uniform(-1, 1, caption.shape) * rng.integers(0, 2, caption.shape)
    wide = caption + engine.to_backend(np.zeros((1, 1), np.float32))  # sums of 16-bit numbers would be rounded
    count = math.prod(caption.shape)
    centred = wide - wide.sum(axis=(0, 1), keepdims=True) / count
    deviation = ((centred * centred).sum(axis=(0, 1), keepdims=True) / count) ** 0.5  # (1, 1)
    return engine.settle(wide + variety * deviation * engine.to_backend(noise.astype(np.float32)))
