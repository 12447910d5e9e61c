"""Prompt text to token ids: Qwen's chat template around one user message, then the checkpoint's own tokenizer.

The official pipeline enables thinking. With this template that means: no text follows the header of the assistant.
Source: encode_prompt in pipeline_z_image.py of diffusers; chat_template of Qwen3-4B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers

from zimage_ref.errors import FormatError
from zimage_ref.formats.reading import read_text
from zimage_ref.formats.tensors import Array

MAX_TOKENS = 512  # template included; the end of a longer prompt is cut off, as in the official pipeline
# without thinking: the template then writes that nothing was thought
_CHAT = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n"
)
_STOPS = ("<|im_end|>", "<|endoftext|>")
_TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def render(prompt: str) -> str:
    """`prompt` in the chat template."""
    return _TEMPLATE.format(prompt=prompt)


class Tokenizer:
    """The tokenizer in a `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError unless `path` is a tokenizer with Qwen's chat tokens."""
        self._path = path
        with self._faults("not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_str(read_text(path))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        for token in ("<|im_start|>", "<|im_end|>"):
            if self._tokenizer.token_to_id(token) is None:
                raise FormatError(f"{path}: has no token {token}: it is not the tokenizer of Z-Image's text encoder")

    @property
    def vocab_size(self) -> int:
        """Token ids are from 0 up to this number, exclusive."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def count(self, prompt: str) -> int:
        """The number of tokens of `prompt` in its template, before it is cut."""
        return len(self._ids(prompt))

    def encode(self, prompt: str) -> Array:
        """Token ids (T,) int32 of `prompt` in its template, at most MAX_TOKENS."""
        return np.asarray(self._ids(prompt)[:MAX_TOKENS], np.int32)

    def encode_chat(self, system: str, message: str) -> list[int]:
        """Token ids of a system prompt and a message of the user, up to where the answer begins."""
        return self._encoded(_CHAT.format(system=system, message=message))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        with self._faults("this tokenizer cannot decode its own tokens"):
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def stops(self) -> frozenset[int]:
        """The ids of the tokens that end an answer."""
        ids = (self._tokenizer.token_to_id(token) for token in _STOPS)
        return frozenset(id for id in ids if id is not None)

    def _ids(self, prompt: str) -> list[int]:
        return self._encoded(render(prompt))

    def _encoded(self, text: str) -> list[int]:
        with self._faults("this tokenizer cannot encode the prompt"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @contextmanager
    def _faults(self, fact: str) -> Iterator[None]:
        """A block in which a fault of the library becomes a FormatError with `fact`.

        The library raises plain Exception for every fault. If its Rust code panics, that is a BaseException.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise FormatError(f"{self._path}: {fact}: {error}") from error
