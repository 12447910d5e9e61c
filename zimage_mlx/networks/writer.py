"""Qwen3 as a language model on MLX: the text encoder, and what follows it to write text.

Source: modeling_qwen3.py of transformers (Qwen3ForCausalLM with tied embeddings).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zimage_ref.formats.tensors import Array, Tensor
from zimage_ref.model.checks import check_finite
from zimage_ref.model.config import TextEncoderConfig
from zimage_ref.model.sampling import LOGITS, TEMPERATURE, TOP_K, TOP_P

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
        """The next tokens ids (T,) -> the logits (vocab_size,) of the token after them."""
        return np.array(self._logits(mx.array(list(ids))))

    def tokens(self, ids: Sequence[int], lots: Iterable[float]) -> Iterator[int]:
        """The tokens after the next ones ids (T,), one for each lot; see `model.sampling`.

        While a token is computed, the one after it is queued. So the GPU need not wait for Python.
        Raises ConfigError if the logits are not finite.
        """
        given, queued = mx.array(list(ids)), None
        for lot in lots:
            logits = self._logits(given)
            given, is_finite = drawn(logits, lot), mx.isfinite(logits).all()
            mx.async_eval(given, is_finite)
            if queued is not None:
                yield _token(*queued)
            queued = given, is_finite
        if queued is not None:
            yield _token(*queued)

    def _logits(self, ids: mx.array) -> mx.array:
        """ids (T,) -> (vocab_size,) float32."""
        x = self._encoder.model(ids[None], self._past[:-1])  # (1, T, hidden_size)
        last = self._ending.norm(self._ending.layer(x, self._past[-1])[:, -1])
        head = self._ending.head or self._encoder.model.embed_tokens
        logits: mx.array = head.as_linear(last)[0].astype(mx.float32)
        return logits


def drawn(logits: mx.array, lot: float) -> mx.array:
    """The token (1,) of `lot`, from logits (vocab_size,), as `model.sampling.drawn`; any if they are not finite."""
    count = min(TOP_K, logits.size)
    top = mx.sort(mx.argpartition(-logits, count - 1)[:count])  # in order, so that of equals the lower comes first
    top = top[mx.argsort(-logits[top])]  # (count,)
    shares = mx.softmax(logits[top] / TEMPERATURE)
    shares = mx.where(mx.cumsum(shares, inclusive=False) < TOP_P, shares, 0.0)
    sums = mx.cumsum(shares)
    place = mx.minimum((sums <= lot * sums[-1:]).sum(keepdims=True), (shares > 0).sum() - 1)  # (1,)
    return top[place]


def _token(token: mx.array, is_finite: mx.array) -> int:
    check_finite(LOGITS, np.where(is_finite.item(), 0.0, np.nan))
    (found,) = np.array(token).tolist()
    return int(found)
