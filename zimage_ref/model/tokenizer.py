"""Prompt text to token ids: Qwen's chat template around one user message, then the checkpoint's own tokenizer.

The official pipeline enables thinking. With this template that means: no text follows the header of the assistant.
Source: encode_prompt in pipeline_z_image.py of diffusers; chat_template of Qwen3-4B.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers

from zimage_ref.errors import FormatError
from zimage_ref.formats.reading import read_text
from zimage_ref.formats.tensors import Array

MAX_TOKENS = 512  # template included; the end of a longer prompt is cut off, as in the official pipeline
_TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def render(prompt: str) -> str:
    """`prompt` in the chat template."""
    return _TEMPLATE.format(prompt=prompt)


class Tokenizer:
    """The tokenizer in a `tokenizer.json`."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError unless `path` is a tokenizer with Qwen's chat tokens."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(read_text(path))
        except Exception as error:  # the library raises plain Exception for every fault
            raise FormatError(f"{path}: not a tokenizer.json: {error}") from error
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
        return len(self._tokenizer.encode(render(prompt), add_special_tokens=False).ids)

    def encode(self, prompt: str) -> Array:
        """Token ids (T,) int32 of `prompt` in its template, at most MAX_TOKENS."""
        ids = self._tokenizer.encode(render(prompt), add_special_tokens=False).ids
        return np.asarray(ids[:MAX_TOKENS], np.int32)
