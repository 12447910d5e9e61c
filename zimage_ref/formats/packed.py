"""A tensor in another program's packed form, such as float8 with scales. It is decoded to float32 when you read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import numpy as np

from .tensors import DTYPES, Array, DType, Tensor, cast, float_dtype, values_as_stored

F32 = DTYPES["f32"]


@dataclass(frozen=True, kw_only=True)
class PackedTensor(Tensor):
    """`shape` is that of the decoded values. `dtype` is what `read` rounds them to."""

    values: Callable[[], Array]  # decodes to float32
    raw: Mapping[str, Tensor]  # the stored tensors, by the last part of their names; bytes are uint8
    padded: bool = False  # whether rows and columns were added to reach a multiple
    whole: int  # the number of values that `raw` holds; this tensor may be a part of them

    @classmethod
    def of_values(
        cls,
        shape: tuple[int, ...],
        storage: str,
        values: Callable[[], Array],
        raw: Mapping[str, Tensor],
        dtype: str = "bf16",
        padded: bool = False,
    ) -> PackedTensor:
        """A tensor of `shape` that `values` decodes to float32. storage: the name of its form, for people."""
        target = float_dtype(dtype)
        values = partial(_as_they_are, values)
        read = partial(_rounded, values, target)
        return cls(shape, target, read, storage, values=values, raw=raw, padded=padded, whole=prod(shape))

    @property
    def stored_nbytes(self) -> int:
        nbytes = sum(tensor.nbytes for tensor in self.raw.values())
        return nbytes * self.size // max(1, self.whole)

    def cast(self, name: str | None) -> Tensor:
        """The same tensor, rounded once from the decoded float32 values to the float dtype `name`."""
        if name is None or float_dtype(name) == self.dtype:
            return self
        dtype = float_dtype(name)
        return replace(self, dtype=dtype, read=partial(_rounded, self.values, dtype))

    def view(self, shape: tuple[int, ...], change: Callable[[Array], Array]) -> Tensor:
        """A part or another form of the decoded values, still rounded only once."""

        def values() -> Array:
            return change(self.values())

        return replace(self, shape=shape, values=values, read=partial(_rounded, values, self.dtype), padded=False)

    def fitted(self, shape: tuple[int, ...]) -> Tensor:
        """Without the rows and columns that pad it, if that makes it a tensor of `shape`."""
        smaller = len(shape) == len(self.shape) and all(a <= b for a, b in zip(shape, self.shape, strict=True))
        if not self.padded or not smaller:
            return self
        corner = tuple(slice(n) for n in shape)
        return self.view(shape, lambda array: array[corner])


def as_float32(tensor: Tensor) -> Array:
    """The values of `tensor` in float32; integers too."""
    if isinstance(tensor, PackedTensor):
        return tensor.values()
    array = tensor.cast("f32").read()
    return np.asarray(array, F32)


def _as_they_are(values: Callable[[], Array]) -> Array:
    with values_as_stored():
        return values()


def _rounded(values: Callable[[], Array], dtype: DType) -> Array:
    return cast(values(), dtype)
