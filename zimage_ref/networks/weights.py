"""A model's weights for NumPy: left on disk as stored, turned into numbers when used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from zimage_ref.formats.tensors import DTYPE_NAMES, Array, Tensor, Tensors, cast
from zimage_ref.lora.arithmetic import FloatDType, NumPyArithmetic
from zimage_ref.lora.updates import LoRA, Update, by_parameter, updated


@dataclass(frozen=True, eq=False)
class Weights:
    """Named weights under a prefix, in working precision, with LoRAs merged in as they are read.

    Nothing is kept: each use reads (and upcasts) the mapped tensor anew, so that a 12 GB checkpoint needs the memory
    of its largest layer. A tensor stored in the working dtype is used in place.
    """

    tensors: Tensors
    dtype: FloatDType
    prefix: str = ""
    loras: dict[str, list[tuple[Update, float]]] = field(default_factory=dict)  # by parameter; one for all parts

    def at(self, prefix: str) -> Weights:
        """The weights below `prefix`, for one part of the model."""
        return replace(self, prefix=f"{self.prefix}{prefix}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def __getitem__(self, name: str) -> Array:
        weight: Array = self._stored(name).read()
        return updated(weight, self.loras.get(self.prefix + name, ()), NumPyArithmetic(self.dtype))

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
