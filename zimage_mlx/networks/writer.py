"""Qwen3 as a language model on MLX: the text encoder, and what follows it to write text.

Source: modeling_qwen3.py of transformers (Qwen3ForCausalLM with tied embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zimage_ref.formats.tensors import Array, Tensor
from zimage_ref.model.config import TextEncoderConfig

from .text_encoder import Layer, Past, TextEncoder


class Ending(nn.Module):
    """The last layer, the last norm, and the head if the encoder has no embedding in memory."""

    def __init__(self, config: TextEncoderConfig, has_head: bool) -> None:
        super().__init__()
        self.layer = Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Embedding(config.vocab_size, config.hidden_size) if has_head else None


def ending_tensors(
    config: TextEncoderConfig, spare: Mapping[str, Tensor], embedding: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of an `Ending` by its names. spare: by official name. embedding: None if there is no head."""
    last = f"model.layers.{config.used_layers}."
    tensors = {name.replace(last, "layer.").removeprefix("model."): tensor for name, tensor in spare.items()}
    return tensors if embedding is None else {**tensors, "head.weight": embedding}


class Writer:
    """The text encoder and its ending. It remembers the tokens that it was given: each call takes those that follow."""

    def __init__(self, encoder: TextEncoder, ending: Ending) -> None:
        self._encoder, self._ending = encoder, ending
        self._past = [Past() for _ in [*encoder.model.layers, ending.layer]]

    def __call__(self, ids: Sequence[int]) -> Array:
        """The next tokens ids (T,) -> the logits (vocab_size,) float32 of the token after them."""
        x = self._encoder.model(mx.array(list(ids))[None], self._past[:-1])  # (1, T, hidden_size)
        last = self._ending.norm(self._ending.layer(x, self._past[-1])[:, -1])
        head = self._ending.head or self._encoder.model.embed_tokens
        return np.array(head.as_linear(last)[0].astype(mx.float32))
