"""The captions that a picture may be shown with, and which of them an epoch draws.

    lines      each line of the caption is a caption of its own         (`caption_lines`)
    choices    {a|b} is a or b; one choice may hold another             (`caption_choices`)
    tags       the parts between commas in another order                (`shuffle_tags`, `keep_tags`)

A draw depends on the seed, the epoch and the item alone. So the captions of a whole run are known before it starts,
and they are encoded then. Orders of tags are taken from ORDERS, so that a long run does not encode a caption a step.
"""

from __future__ import annotations

import re

import numpy as np

from .batches import CAPTION, TAGS, rng_for
from .captions import lines_of
from .config import TrainConfig

ORDERS = 16  # orders of tags that are drawn
_CHOICE = re.compile(r"\{([^{}]*)\}")  # an innermost one
_MOST = 64  # captions that `all_of` lists


class Variants:
    """The captions that a run draws."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config

    @property
    def vary(self) -> bool:
        """Whether captions may differ from one epoch to the next."""
        config = self._config
        return config.caption_lines or config.caption_choices or config.shuffle_tags

    def draw(self, caption: str, epoch: int, item: int) -> str:
        """The text of `caption` for `item` in `epoch`."""
        config = self._config
        if not self.vary:
            return caption
        rng = rng_for(config.seed, CAPTION, epoch, item)
        lines = self._lines(caption)
        text = self._chosen(lines[int(rng.integers(len(lines)))], rng)
        return self._shuffled(text, int(rng.integers(ORDERS))) if config.shuffle_tags else text

    def first(self, caption: str) -> str:
        """`caption` with the first line and the first of each choice: for held-out pictures."""
        return self._chosen(self._lines(caption)[0], None)

    def all_of(self, caption: str) -> list[str]:
        """The texts that `caption` may become, in one order of its tags. At most _MOST texts, and some of each line."""
        found: list[str] = []
        for line in self._lines(caption):
            texts = [line]
            while self._config.caption_choices and any(map(_CHOICE.search, texts)) and len(texts) < _MOST:
                texts = [option for text in texts for option in _opened(text)]
            found += texts
        return found

    def _lines(self, caption: str) -> list[str]:
        return (lines_of(caption) if self._config.caption_lines else []) or [caption]

    def _chosen(self, text: str, rng: np.random.Generator | None) -> str:
        """`text` with one of each choice; the first ones without a generator."""
        while self._config.caption_choices and (found := _CHOICE.search(text)):
            options = found[1].split("|")
            chosen = options[int(rng.integers(len(options))) if rng else 0]
            text = text[: found.start()] + chosen + text[found.end() :]
        return text

    def _shuffled(self, text: str, order: int) -> str:
        tags = [tag.strip() for tag in text.split(",")]
        kept, rest = tags[: self._config.keep_tags], tags[self._config.keep_tags :]
        moved = rng_for(self._config.seed, TAGS, order, len(rest)).permutation(len(rest)).tolist()
        return ", ".join([*kept, *(rest[i] for i in moved)])


def _opened(text: str) -> list[str]:
    """`text` with each option of its first choice."""
    found = _CHOICE.search(text)
    if not found:
        return [text]
    return [text[: found.start()] + option + text[found.end() :] for option in found[1].split("|")]
