"""Lets the text encoder of the model, a language model, write a longer prompt from a short one.

The tokens follow from the seed of the picture; `zimage_ref.model.sampling` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.model.parameters import text_encoder_unused
from zimage_ref.model.tokenizer import Tokenizer

SYSTEM = (
    "You write prompts for a program that makes pictures. The user names an idea. Answer with the description of one "
    "picture, in the language of the idea, in at most 120 words. Keep all that the idea names: things, their number, "
    "colours, places, persons, style. If words are to be read in the picture, put them in double quotation marks, "
    "letter by letter. Add what the idea leaves open: surroundings, light, materials, point of view, composition. "
    "Describe only what one can see. Write plain sentences, no list, no title, no remark about quality."
)
MAX_NEW = 480  # tokens of an answer, so that it fits into a prompt
_STREAM = 2  # of random numbers, beside those of noise and variety

Written = Callable[[int, int], None]  # takes the tokens so far, and the most that there will be


class Writer(Protocol):
    """The text encoder as a language model at the beginning of a text."""

    def tokens(self, ids: Sequence[int], lots: Iterable[float], /) -> Iterator[int]:
        """The tokens after ids (T,), one for each lot; see `model.sampling`."""


def lots_of(seed: int) -> Iterator[float]:
    """Endless numbers in [0, 1), the same for the same seed."""
    rng = np.random.default_rng([seed, _STREAM])
    while True:
        yield rng.random()


def answer(
    writer: Writer, ids: Sequence[int], stops: frozenset[int], lots: Iterable[float], most: int | None = None,
    written: Written = lambda done, total: None,
) -> list[int]:  # fmt: skip
    """The tokens that follow `ids`, without the one that ends them; at most `most`, or MAX_NEW."""
    made: list[int] = []
    limit = MAX_NEW if most is None else most
    for token in writer.tokens(ids, islice(lots, limit)):
        if token in stops:
            break
        made.append(token)
        written(len(made), limit)
    return made


def text_of(tokenizer: Tokenizer, made: Sequence[int], prompt: str) -> str:
    """The prompt that was written. Raises ConfigError if it holds no word."""
    text = " ".join(tokenizer.decode(made).split())
    if not any(letter.isalnum() for letter in text):
        raise ConfigError(f"`enhance`: the text encoder wrote nothing for {prompt[:60]!r}: try another seed")
    return text


def check_can_write(model: ModelFolder) -> None:
    """Raises ConfigError if the text encoder of `model` cannot write: it lacks weights, or has never learned it."""
    spare = model.spare.get("text_encoder", {})
    if missing := text_encoder_unused(model.text_encoder) - spare.keys():
        raise ConfigError(
            f"`enhance` needs all layers of the text encoder, and {model.files.get('text_encoder', model.path)} lacks "
            f"{len(missing)} tensors of the last one: give the whole Qwen3-4B as `text_encoder`"
        )
    if (spare["model.norm.weight"].cast("f32").read() == 1).all():
        raise ConfigError(
            f"`enhance` needs a text encoder that can write, and that of {model.path} has learned nothing but captions"
        )


def checked_system(text: str | None) -> str:
    """The system prompt `text`, None for the usual one. Raises ConfigError if it is empty."""
    if text is None:
        return SYSTEM
    if not text.strip():
        raise ConfigError("`enhance_with`: the file holds no text")
    return text.strip()
