"""What a user can ask for: each option once, with its default, type, help text and bounds.

The command line, config files, the Python interface and the README all take them from here and from `train_config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError


def option(default: Any, help: str, **traits: bool) -> Any:
    """A dataclass field with a default, the help text that the command line shows, and traits of `train_config`."""
    return field(default=default, metadata={"help": help, **traits})


def required(help: str, **traits: bool) -> Any:
    """A dataclass field without a default."""
    return field(metadata={"help": help, **traits})


@dataclass(frozen=True)
class GenerateConfig:
    """What a picture should be. Raises ConfigError for values out of bounds."""

    prompt: str = required("what the picture shows")
    width: int = option(512, "width in pixels, a multiple of 16")
    height: int = option(512, "height in pixels, a multiple of 16")
    steps: int = option(8, "denoising steps")
    guidance: float = option(0.0, "classifier-free guidance; 0 is none, as Turbo wants it")
    negative_prompt: str = option("", "what the picture should not show; needs guidance")
    seed: int = option(0, "seed of the starting noise")

    def __post_init__(self) -> None:
        check_side("width", self.width)
        check_side("height", self.height)
        at_least(self, 1, "steps")
        at_least(self, 0, "seed", "guidance")


SIDE_MULTIPLE = 16  # 8 pixels a latent, 2 x 2 latents a token


def check_side(name: str, side: int) -> None:
    """Raises ConfigError unless `side` is a positive multiple of SIDE_MULTIPLE."""
    if side < SIDE_MULTIPLE or side % SIDE_MULTIPLE:
        nearest = max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE)
        raise ConfigError(f"--{name} {side} must be a multiple of {SIDE_MULTIPLE}: {nearest} is the nearest")


def at_least(config: Any, low: float, *names: str) -> None:
    """Raises ConfigError where one of the fields `names` of `config` is below `low`."""
    for name in names:
        if not getattr(config, name) >= low:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least {low}")
