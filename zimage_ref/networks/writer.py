"""Qwen3 as a language model: the layers of the text encoder, and what follows them to write text.

Source: modeling_qwen3.py of transformers (Qwen3ForCausalLM with tied embeddings).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.config import TextEncoderConfig
from zimage_ref.model.sampling import drawn

from .ops import linear, rms_norm
from .text_encoder import Layer, Past
from .weights import Weights


class Writer:
    """All layers, the last norm, and the embedding as the head.

    It remembers the tokens that it was given. So each call takes those that follow.
    """

    def __init__(self, config: TextEncoderConfig, weights: Weights) -> None:
        self.w, self.eps = weights.at("model"), config.rms_norm_eps
        self.layers = [Layer(self.w.at(f"layers.{i}"), config) for i in range(config.num_hidden_layers)]
        self._past = [Past() for _ in self.layers]

    def __call__(self, ids: Sequence[int]) -> Array:
        """The next tokens ids (T,) -> the logits (vocab_size,) of the token after them."""
        x = self.w.rows("embed_tokens.weight", np.asarray(ids))
        for layer, past in zip(self.layers, self._past, strict=True):
            x = layer(x, past)
        return linear(rms_norm(x[-1], self.w["norm.weight"], self.eps), self.w["embed_tokens.weight"])

    def tokens(self, ids: Sequence[int], lots: Iterable[float]) -> Iterator[int]:
        """The tokens after the next ones ids (T,), one for each lot; see `model.sampling`."""
        for lot in lots:
            token = drawn(self(ids), lot)
            yield token
            ids = [token]
