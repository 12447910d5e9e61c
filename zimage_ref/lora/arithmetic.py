"""What a LoRA adds to a weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zimage_ref.formats.tensors import Array

from .updates import DoRA, Hadamard, Kronecker, LowRank, Plain, Update


def updated(weight: Array, updates: Sequence[tuple[Update, float]]) -> Array:
    """W + sum of scale * delta(W): each update sees the weight without the others, so their order is nothing."""
    original = weight
    for update, scale in updates:
        weight = weight + weight.dtype.type(scale) * delta(update, original)
    return weight


def delta(update: Update, weight: Array) -> Array:
    """What `update` at scale 1 adds to `weight`, in the weight's dtype."""
    if isinstance(update, DoRA):
        target = weight + delta(update.update, weight)
        axis = 1 if update.magnitude.shape[1] == 1 else 0
        norm = np.sqrt(np.sum(target * target, axis=axis, keepdims=True))
        magnitude = update.magnitude.astype(weight.dtype)
        return np.where(norm > 0, target / np.where(norm > 0, norm, 1), 0) * magnitude - weight
    return weight.dtype.type(update.scale) * _unscaled(update, weight.dtype)


def _unscaled(update: Plain, dtype: np.dtype[np.floating]) -> Array:
    if isinstance(update, LowRank):
        return update.B.astype(dtype) @ update.A.astype(dtype)
    if isinstance(update, Kronecker):
        return np.kron(update.W1.astype(dtype), update.W2.astype(dtype))[update.start : update.stop]
    if isinstance(update, Hadamard):
        A1, B1, A2, B2 = (factor.astype(dtype) for factor in (update.A1, update.B1, update.A2, update.B2))
        return (A1 @ B1) * (A2 @ B2)
    return update.D.astype(dtype)
