"""The tensors of one module in a LoRA file. Kinds of updates are built from them; shapes and numbers are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from zimage_ref.errors import WeightError, listing
from zimage_ref.formats.tensors import DTYPE_NAMES, DTYPES, FLOATS, Array, Tensor, cast

LARGEST = 1e8  # trained numbers are far smaller; squares of products of such numbers still fit in float32
Scale = Callable[[str, int | None], float]  # module, rank (None: no product) -> alpha / rank without an own alpha


@dataclass(frozen=True)
class Parts:
    """Tensors of one module: part -> (key in the file, tensor)."""

    path: Path
    module: str
    tensors: Mapping[str, tuple[str, Tensor]]
    layers: int  # the number of layers in the module: 3 if q, k and v are fused, else 1
    default_scale: Scale

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def key(self, part: str) -> str:
        """The key of the part in the file."""
        return self.tensors[part][0]

    @property
    def keys(self) -> str:
        """The keys of all parts in the file, for messages."""
        return listing(key for key, _ in self.tensors.values())

    def without(self, part: str) -> Parts:
        """All parts except `part`."""
        return replace(self, tensors={name: found for name, found in self.tensors.items() if name != part})

    def error(self, fact: str) -> WeightError:
        """An error that names this file and `fact`."""
        return WeightError(f"{self.path}: {fact}")

    def array(self, part: str, ndim: int | None = 2) -> Array:
        """The part in float32. Raises WeightError unless it has `ndim` axes (None: any) and all numbers are finite."""
        key, tensor = self.tensors[part]
        if DTYPE_NAMES[tensor.dtype] not in FLOATS:
            raise self.error(f"{key} holds {DTYPE_NAMES[tensor.dtype]}, not floating point numbers")
        if ndim is not None and len(tensor.shape) != ndim:
            raise self.error(f"{key} has shape {tensor.shape}, which does not fit a Linear layer")
        values = cast(tensor.read(), DTYPES["f32"])
        if not (np.abs(values) <= LARGEST).all():  # this catches NaN too
            raise self.error(
                f"{key} holds numbers that are not finite, or beyond {LARGEST:g}: the file is damaged, "
                "or its training failed"
            )
        return values

    def stored_whole(self, part: str, title: str) -> Array:
        """The part, of any shape, for a kind without products. Raises WeightError if there is an alpha beside it."""
        if "alpha" in self:
            raise self.error(f"{self.key('alpha')} belongs to no low-rank matrices: a {title} has no alpha")
        return self.array(part, ndim=None)

    def factors(self, left: str, right: str) -> tuple[Array, Array]:
        """Two parts (rows, rank) and (rank, columns). Raises WeightError if they do not multiply."""
        one, other = self.array(left), self.array(right)
        if one.shape[1] != len(other) or not len(other):
            raise self.error(
                f"{self.key(left)} {one.shape} and {self.key(right)} {other.shape} do not multiply: they share no rank"
            )
        return one, other

    def scale(self, rank: int | None) -> float:
        """alpha / rank. alpha is the module's own if it has one; else metadata or a JSON file give it.

        rank: None for matrices that are stored whole. Their own alpha does not count, but one of PEFT's config does.
        """
        if "alpha" not in self:
            return self.default_scale(self.module, rank)
        return self._number("alpha") / rank if rank is not None else 1.0

    def _number(self, part: str) -> float:
        """The part as one number, which may be an integer: musubi-tuner's converter writes such alphas."""
        key, tensor = self.tensors[part]
        if tensor.size != 1:
            raise self.error(f"{key} has shape {tensor.shape}: it must be one number")
        if tensor.dtype.kind in "iu":
            whole = int(tensor.read().reshape(()))
            if abs(whole) > LARGEST:
                raise self.error(f"{key} is {whole}, beyond {LARGEST:g}: the file is damaged")
            return float(whole)
        return float(self.array(part, ndim=None).reshape(()))
