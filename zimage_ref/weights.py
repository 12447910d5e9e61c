"""A model's weights for NumPy: left on disk as stored, turned into numbers when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .lora import DoRA, Hadamard, Kronecker, LoRA, LowRank, Plain, Update, by_parameter
from .tensors import DTYPE_NAMES, Array, Tensor, Tensors, cast


class Weights:
    """Named weights under a prefix, in working precision, with LoRAs merged in on the way.

    Nothing is kept: each use reads (and upcasts) the mapped tensor anew, so that a 12 GB checkpoint needs the memory
    of its largest layer. A tensor stored in the working dtype is used in place.
    """

    def __init__(self, tensors: Tensors, dtype: np.dtype[np.floating]) -> None:
        self.tensors, self.dtype, self.prefix = tensors, dtype, ""
        self._loras: dict[str, list[tuple[Update, float]]] = {}

    def at(self, prefix: str) -> Weights:
        """The weights below `prefix`, for one part of the model."""
        part = Weights(self.tensors, self.dtype)
        part.prefix, part._loras = f"{self.prefix}{prefix}.", self._loras
        return part

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def __getitem__(self, name: str) -> Array:
        return updated(self._stored(name).read(), self._loras.get(self.prefix + name, ()))

    def rows(self, name: str, indices: Array) -> Array:
        """Some rows of a matrix, without reading the others."""
        tensor = self.tensors[self.prefix + name]
        return cast(tensor.read()[indices], self.dtype)

    def _stored(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name].cast(DTYPE_NAMES[self.dtype])

    def use_loras(self, loras: Sequence[tuple[LoRA, float]]) -> None:
        """From now on W + sum of scale * update; replaces the LoRAs of an earlier call, also in every part."""
        self._loras.clear()
        self._loras.update(by_parameter(loras))


def of_arrays(arrays: Mapping[str, Array], dtype: type[np.floating] = np.float64) -> Weights:
    """Weights from arrays in memory."""
    return Weights({name: Tensor.of(array) for name, array in arrays.items()}, np.dtype(dtype))


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
