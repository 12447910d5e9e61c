"""Lets the text encoder of the model, a language model, write a longer prompt from a short one.

Sampling is as the model card of Qwen3 recommends without thinking. The tokens follow from the seed of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array
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
_TEMPERATURE, _TOP_K, _TOP_P = 0.7, 20, 0.8
_STREAM = 2  # of random numbers, beside those of noise and variety

NextToken = Callable[[Sequence[int]], Array]  # the next ids -> logits (vocab_size,) of the token after them
Written = Callable[[int, int], None]  # takes the tokens so far, and the most that there will be


class Choose(Protocol):
    """Takes logits (vocab_size,) and gives the id of a token."""

    def __call__(self, logits: Array, /) -> int: ...


def drawn(seed: int) -> Choose:
    """Draws from the most likely tokens; the same numbers for the same seed."""
    rng = np.random.default_rng([seed, _STREAM])

    def choose(logits: Array) -> int:
        top = np.argsort(-logits, kind="stable")[:_TOP_K]
        scores = np.asarray(logits, np.float64)[top] / _TEMPERATURE
        shares = np.exp(scores - scores[0])
        shares /= shares.sum()
        shares[np.cumsum(shares) - shares >= _TOP_P] = 0  # the first token always stays
        return int(rng.choice(top, p=shares / shares.sum()))

    return choose


def answer(
    next_token: NextToken, ids: Sequence[int], stops: frozenset[int], choose: Choose, most: int | None = None,
    written: Written = lambda done, total: None,
) -> list[int]:  # fmt: skip
    """The tokens that follow `ids`, without the one that ends them; at most `most`, or MAX_NEW."""
    made: list[int] = []
    limit = MAX_NEW if most is None else most
    while len(made) < limit:
        token = choose(next_token(ids))
        if token in stops:
            break
        made.append(token)
        ids = [token]
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
