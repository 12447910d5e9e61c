"""The arrays that the halves of a block keep for a gradient."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class AttentionKept(NamedTuple):
    """What a gradient needs of the half with attention."""

    x: mx.array  # (B, S, D), its input
    q: mx.array  # (B, S, H, K), not yet normed, like k and v
    k: mx.array
    v: mx.array
    attended: mx.array  # (B, S, D), attention before its last Linear layer
    out: mx.array  # (B, S, D), after it
    scale: mx.array | None  # (B, 1, D), like gate; None for a block without modulation
    gate: mx.array | None


class FeedForwardKept(NamedTuple):
    """What a gradient needs of the half with the feed-forward. Its input is made again from the other half's."""

    hidden_gate: mx.array  # (B, S, F)
    hidden_value: mx.array  # (B, S, F)
    out: mx.array  # (B, S, D)
    scale: mx.array | None  # (B, 1, D), like gate; None for a block without modulation
    gate: mx.array | None
