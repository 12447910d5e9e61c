"""The weights of a model for NumPy. They stay on disk and are read when a layer uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from zimage_ref.formats.tensors import DTYPE_NAMES, Array, Tensor, Tensors, cast
from zimage_ref.lora.arithmetic import FloatDType, NumPyArithmetic
from zimage_ref.lora.updates import LoRA, Update, by_parameter, updated


@dataclass(frozen=True, eq=False)
class Weights:
    """Named weights under a prefix, in working precision. LoRAs are merged when a weight is read.

    Weights are not kept: each use reads the mapped tensor and casts it again. So a 12 GB checkpoint needs the memory of
    its largest layer. A tensor that is stored in the working dtype is used without a copy.
    """

    tensors: Tensors
    dtype: FloatDType
    prefix: str = ""
    loras: dict[str, list[tuple[Update, float]]] = field(default_factory=dict)  # by parameter; shared by all parts

    def at(self, prefix: str) -> Weights:
        """The weights whose names begin with `prefix`, for one part of the model."""
        return replace(self, prefix=f"{self.prefix}{prefix}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def __getitem__(self, name: str) -> Array:
        weight: Array = self._stored(name).read()
        return updated(weight, self.loras.get(self.prefix + name, ()), NumPyArithmetic(self.dtype))

    def rows(self, name: str, indices: Array) -> Array:
        """The rows `indices` of a matrix. The others are not read."""
        tensor = self.tensors[self.prefix + name]
        return cast(tensor.rows(indices), self.dtype)

    def _stored(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name].cast(DTYPE_NAMES[self.dtype])

    def use_loras(self, loras: Sequence[tuple[LoRA, float]]) -> None:
        """Gives W + sum of scale * update from now on, in every part too. Replaces the LoRAs of an earlier call."""
        found = by_parameter(loras)
        self.loras.clear()
        self.loras.update(found)
