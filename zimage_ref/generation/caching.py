"""The options of a step cache: how one names it, in which pictures it acts, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from zimage_ref.bounds import CACHE_INTERVAL, CACHE_RATIO, CACHE_THRESHOLD
from zimage_ref.errors import ConfigError
from zimage_ref.memory import CAPTION_TOKENS
from zimage_ref.model.step_cache import Added, FirstBlockJudge, MagJudge, StepCache, Taylor

from .samplers import TWICE

if TYPE_CHECKING:
    from zimage_ref.checkpoints.folder import ModelFolder

    from .jobs import Request

FIRST_BLOCK, TAYLOR, MAG = CACHES = ("first-block", "taylor", "mag")
THRESHOLD, INTERVAL = 0.1, 4  # defaults of first-block and of taylor
MIN_STEPS = 20  # with fewer steps, each differs too much from the one before
_KEPT = {FIRST_BLOCK: 2, TAYLOR: 2, MAG: 1}  # streams that are kept for each row of a batch


class CacheConfig(Protocol):
    """The fields of GenerateConfig that a step cache needs."""

    @property
    def cache(self) -> str | None: ...
    @property
    def cache_min_steps(self) -> int | None: ...
    @property
    def sampler(self) -> str: ...


@dataclass(frozen=True)
class CacheChoice:
    """A step cache as an option names it."""

    name: str  # of CACHES
    threshold: float = THRESHOLD  # of first-block
    interval: int = INTERVAL  # of taylor
    ratios: tuple[float, ...] | None = None  # of mag, for each step

    @classmethod
    def parse(cls, text: str) -> CacheChoice:
        """The choice first-block:THRESHOLD, taylor:INTERVAL or mag:RATIO,RATIO,... in `text`; the number may be absent.

        Raises ConfigError for anything else.
        """
        name, colon, value = text.partition(":")
        if name not in CACHES:
            raise ConfigError(f"`cache` {name!r} is unknown: known are {', '.join(CACHES)}")
        if not colon:
            return cls(name)
        try:
            numbers = tuple(map(int if name == TAYLOR else float, value.split(",")))
        except ValueError:
            numbers = ()
        if not numbers or (len(numbers) > 1 and name != MAG):
            form = {FIRST_BLOCK: "a threshold such as 0.1", TAYLOR: "a number of steps such as 4", MAG: "ratios"}[name]
            raise ConfigError(f"`cache` {text!r}: after {name}: comes {form}")
        bounds = {FIRST_BLOCK: CACHE_THRESHOLD, TAYLOR: CACHE_INTERVAL, MAG: CACHE_RATIO}[name]
        for number in numbers:
            if fault := bounds.fault(number):
                raise ConfigError(f"`cache` {text!r}: {number:g} {fault}")
        if name == FIRST_BLOCK:
            return cls(name, threshold=numbers[0])
        return cls(name, interval=int(numbers[0])) if name == TAYLOR else cls(name, ratios=numbers)

    def make(self, steps: int) -> StepCache[Any]:
        """A step cache for one batch of `steps` steps."""
        if self.name == TAYLOR:
            return Taylor(self.interval)
        if self.name == MAG:
            return Added(0, partial(MagJudge, steps, self.ratios))
        return Added(1, partial(FirstBlockJudge, self.threshold))


def check_cache(config: CacheConfig) -> None:
    """Raises ConfigError unless the options of a step cache fit each other."""
    if config.cache is None:
        if config.cache_min_steps is not None:
            raise ConfigError("`cache_min_steps` needs `cache`")
        return
    choice = CacheChoice.parse(config.cache)
    if config.sampler in TWICE and choice.name != FIRST_BLOCK:
        raise ConfigError(
            f"`cache` {choice.name} needs predictions at equal distances, and `sampler` {config.sampler} makes two in "
            f"a step: take {FIRST_BLOCK}, or another sampler"
        )


def cache_for(config: CacheConfig, sigmas: Sequence[float]) -> StepCache[Any] | None:
    """A new step cache for a batch with this schedule. None if it has none, or too few steps."""
    choice = choice_for(config, sigmas)
    return choice.make(len(sigmas) - 1) if choice else None


def choice_for(config: CacheConfig, sigmas: Sequence[float]) -> CacheChoice | None:
    """The step cache that acts in this schedule."""
    if config.cache is None or len(sigmas) - 1 < _least_steps(config):
        return None
    return CacheChoice.parse(config.cache)


def _least_steps(config: CacheConfig) -> int:
    return MIN_STEPS if config.cache_min_steps is None else config.cache_min_steps


def idle_remark(config: CacheConfig, sigmas: Sequence[float]) -> tuple[str, ...]:
    """A line for the user if the cache does not act in this schedule."""
    if config.cache is None or choice_for(config, sigmas):
        return ()
    return (
        f"`cache` is not used: it acts from {_least_steps(config)} steps on, and there are {len(sigmas) - 1}. "
        f"`cache_min_steps` changes this",
    )


def kept_values(request: Request, model: ModelFolder) -> int:
    """The numbers that the cache keeps for one picture, with guidance for two rows of a batch."""
    choice = choice_for(request.config, request.sigmas)
    tiles = request.tiles
    tokens = tiles.rows * tiles.columns // model.transformer.patch_size**2 + CAPTION_TOKENS
    rows = len(tiles.places) * (1 + (request.guidance.scale > 0))
    return rows * _KEPT[choice.name] * tokens * model.transformer.dim if choice else 0


def computed_share(config: CacheConfig, sigmas: Sequence[float]) -> float | None:
    """The share of the steps that are computed. None if the pictures themselves decide it."""
    cache, steps = cache_for(config, sigmas), len(sigmas) - 1
    if cache is None:
        return 1.0
    return sum(map(cache.computes, range(steps))) / steps if isinstance(cache, Taylor) else None
