"""Prompts of previews, each with settings of its own.

A setting stands behind the prompt, written as an option of `zimage generate`: two hyphens, its name, its value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TypeVar, get_type_hints

from zimage_ref.bounds import PREVIEW, check_bounds
from zimage_ref.errors import ConfigError
from zimage_ref.generation.presets import Defaults
from zimage_ref.generation.sizes import check_area, check_side
from zimage_ref.options_file import typed

Number = TypeVar("Number", int, float)
_SETTING = re.compile(r"(?:^|\s)--([a-z][a-z_-]*)(?=[\s=]|$)")


@dataclass(frozen=True)
class Preview:
    """A picture to draw during training."""

    text: str  # as the user wrote it, with the settings
    prompt: str
    negative_prompt: str
    width: int  # pixels
    height: int
    steps: int
    guidance: float
    seed: int

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that the model reads for it: the prompt and, with guidance, the negative prompt."""
        return (self.prompt, self.negative_prompt) if self.guidance else (self.prompt,)


@dataclass(frozen=True)
class PreviewPrompt:
    """A prompt with its settings. None takes the value of the run."""

    text: str  # as the user wrote it
    prompt: str
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    negative_prompt: str = ""

    @classmethod
    def parse(cls, text: str) -> PreviewPrompt:
        """Raises ConfigError naming `preview_prompt` for an unknown setting or a value out of bounds."""
        prompt, *found = _SETTING.split(text)
        hints, given = get_type_hints(cls), {}
        for name, value in zip(found[::2], found[1::2], strict=True):
            field = name.replace("-", "_")
            if field not in _SETTINGS:
                raise ConfigError(
                    f"`preview_prompt` {text!r}: {name} is unknown: known are {', '.join(map(_spelled, _SETTINGS))}"
                )
            if field in given:
                raise ConfigError(f"`preview_prompt` {text!r}: {name} is given twice")
            given[field] = typed(value.lstrip("=").strip(), hints[field], f"`preview_prompt` {text!r}: {name}")
        made = cls(text, prompt.strip(), **given)
        try:
            check_bounds(made, PREVIEW)
            for name in ("width", "height"):
                if (side := getattr(made, name)) is not None:
                    check_side(name, side)
        except ConfigError as error:
            raise ConfigError(f"`preview_prompt` {text!r}: {error}") from error
        return made

    def decided(self, side: int, steps: int | None, guidance: float | None, seed: int, model: Defaults) -> Preview:
        """The picture to draw. side to seed: the run's values; those of the model count if they are None.

        Raises ConfigError if it would be too large.
        """
        width, height = _first(self.width, side), _first(self.height, side)
        check_area(width, height)
        return Preview(
            self.text, self.prompt, self.negative_prompt, width, height,
            _first(self.steps, steps, model.preview_steps), _first(self.guidance, guidance, model.guidance),
            _first(self.seed, seed),
        )  # fmt: skip


_SETTINGS = tuple(field.name for field in fields(PreviewPrompt) if field.name not in ("text", "prompt"))


def _spelled(field: str) -> str:
    return field.replace("_", "-")


def _first(*values: Number | None) -> Number:
    """The first of `values` that is not None. The last one never is."""
    return next(value for value in values if value is not None)
