"""A model's weights for NumPy: left on disk as stored, turned into numbers when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from zimage_ref.formats.tensors import DTYPE_NAMES, Array, Tensor, Tensors, cast
from zimage_ref.lora.arithmetic import updated
from zimage_ref.lora.updates import LoRA, Update, by_parameter

Float = np.float32 | np.float64  # what this engine computes in


@dataclass(frozen=True, eq=False)
class Weights:
    """Named weights under a prefix, in working precision, with LoRAs merged in on the way.

    Nothing is kept: each use reads (and upcasts) the mapped tensor anew, so that a 12 GB checkpoint needs the memory
    of its largest layer. A tensor stored in the working dtype is used in place.
    """

    tensors: Tensors
    dtype: np.dtype[Float]
    prefix: str = ""
    loras: dict[str, list[tuple[Update, float]]] = field(default_factory=dict)  # by parameter; one for all parts

    def at(self, prefix: str) -> Weights:
        """The weights below `prefix`, for one part of the model."""
        return replace(self, prefix=f"{self.prefix}{prefix}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def __getitem__(self, name: str) -> Array:
        return updated(self._stored(name).read(), self.loras.get(self.prefix + name, ()))

    def rows(self, name: str, indices: Array) -> Array:
        """Some rows of a matrix, without reading the others."""
        tensor = self.tensors[self.prefix + name]
        return cast(tensor.read()[indices], self.dtype)

    def _stored(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name].cast(DTYPE_NAMES[self.dtype])

    def use_loras(self, loras: Sequence[tuple[LoRA, float]]) -> None:
        """From now on W + sum of scale * update; replaces the LoRAs of an earlier call, also in every part."""
        self.loras.clear()
        self.loras.update(by_parameter(loras))


def of_arrays(arrays: Mapping[str, Array], dtype: type[Float] = np.float64) -> Weights:
    """Weights from arrays in memory."""
    return Weights({name: Tensor.of(array) for name, array in arrays.items()}, np.dtype(dtype))
