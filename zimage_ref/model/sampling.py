"""How a language model draws the next token of a text, by the model card of Qwen3 for answers without thinking.

The most likely tokens count until their shares reach a sum. A lot, uniform in [0, 1), decides among them: the token is
the first at which the sum of the shares is above the lot. So a lot of 0 takes the most likely token.
"""

from __future__ import annotations

import numpy as np

from zimage_ref.formats.tensors import Array

from .checks import check_finite

TEMPERATURE, TOP_K, TOP_P = 0.7, 20, 0.8
LOGITS = "the logits of the text encoder"


def drawn(logits: Array, lot: float) -> int:
    """The token that `lot` draws from logits (vocab_size,). Of equal logits, the lower token comes first.

    Raises ConfigError if a logit is not finite.
    """
    check_finite(LOGITS, logits)
    top = likely(logits)
    scores = np.asarray(logits, np.float64)[top] / TEMPERATURE
    shares = np.exp(scores - scores[0])
    shares /= shares.sum()
    shares[np.cumsum(shares) - shares >= TOP_P] = 0  # the first token always stays
    sums = np.cumsum(shares / shares.sum())
    return int(top[np.searchsorted(sums / sums[-1], lot, side="right")])


def likely(logits: Array) -> Array:
    """The TOP_K most likely tokens, the most likely first. To sort a whole vocabulary would take ten times as long."""
    count = min(TOP_K, len(logits))
    least = np.partition(logits, -count)[-count]
    tokens = np.flatnonzero(logits >= least)
    order: Array = tokens[np.argsort(-logits[tokens], kind="stable")][:count]
    return order
