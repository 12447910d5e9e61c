"""What a LoRA changes: for each parameter of the transformer, one update. The kinds of updates are in `kinds`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import numpy as np

from zimage_ref.formats.tensors import Array

from .arithmetic import AnyArray, Arithmetic, NumPyArithmetic
from .parts import Parts

BIAS = ".bias"  # ends the names of updates of biases
_FLOAT32 = np.dtype(np.float32)
_OVERSAMPLING, _POWER_ITERATIONS = 16, 4  # of the randomized SVD, arXiv 0909.4061
_Kind = TypeVar("_Kind", bound="Update")


class Update(ABC):
    """What a LoRA does to one parameter of `shape`. A subclass is a kind, and knows all there is to know of it.

    `plain` and `low_rank` say what else it can be seen as; None: it cannot.
    """

    title: ClassVar[str]  # what people call the kind
    style: ClassVar[str] = ""  # what the kind's keys are called in the name of a dialect
    suffixes: ClassVar[Mapping[str, str]] = {}  # how any tool ends the kind's keys -> part; the first is written
    forms: ClassVar[tuple[AbstractSet[str], ...]] = ()  # each set of parts that is complete, alpha aside

    @classmethod
    def recognises(cls, parts: AbstractSet[str]) -> bool:
        """Whether `parts` of one module are those of this kind, complete."""
        return parts - {"alpha"} in cls.forms

    @classmethod
    @abstractmethod
    def of_parts(cls, parts: Parts) -> Update:
        """The update that a file's `parts`, which `recognises` accepts, make. Raises WeightError if they do not fit."""

    @abstractmethod
    def tensors(self) -> dict[str, Array]:
        """The parts again, float32, for a file. With alpha, if the kind has one."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """That of the parameter: (out, in) of a Linear layer's weight."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """alpha / rank."""

    @property
    def rank(self) -> int | None:
        """The rank of its matrices, None if it has none."""
        return None

    @property
    def plain(self) -> Plain | None:
        """The same update, as one that adds the same to any weight."""
        return None

    @property
    def low_rank(self) -> tuple[Array, Array] | None:
        """A (rank, in) and B (out, rank), if what it adds is scale * B A."""
        return None

    @abstractmethod
    def added(self, weight: AnyArray, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """What it adds to `weight` (out, in), in the precision of `arithmetic`."""

    @abstractmethod
    def norm(self) -> float:
        """The Frobenius norm of what it adds; of DoRA, of what is inside."""

    @abstractmethod
    def folded(self: _Kind) -> _Kind:
        """The same update at scale 1: the scale is multiplied into its numbers."""

    @abstractmethod
    def rows(self: _Kind, start: int, stop: int) -> _Kind:
        """What it does to some rows of the weight."""

    def split(self: _Kind, count: int) -> list[_Kind]:
        """What it does to each of `count` equal shares of the rows: layers that a file has as one module."""
        share = self.shape[0] // count
        return [self.rows(i * share, (i + 1) * share) for i in range(count)]

    def same_product(self, other: Update) -> bool:
        """Whether both are low-rank and have the same product B A, whatever their scales."""
        if self.low_rank is None or other.low_rank is None or self.shape != other.shape:
            return False
        # A random vector tells two products apart without computing either
        x = np.random.default_rng(0).standard_normal((self.shape[1], 4)).astype(np.float32)
        one, two = (B @ (A @ x) for A, B in (self.low_rank, other.low_rank))
        return bool(np.allclose(one, two, rtol=1e-3, atol=1e-3 * float(np.abs(one).max(initial=0))))


@dataclass(frozen=True)
class Plain(Update):
    """An update that adds scale * matrix to any weight."""

    scale: float = field(default=1.0, kw_only=True)  # alpha / rank

    @property
    def plain(self) -> Plain:
        """Itself."""
        return self

    @abstractmethod
    def matrix(self, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """What is scaled and added, of `shape`."""

    def added(self, weight: AnyArray, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """scale * matrix."""
        return self.matrix(arithmetic) * self.scale

    def scaled(self, factor: float) -> Plain:
        """The same update at `factor` times its scale."""
        return replace(self, scale=self.scale * factor)

    def dense(self) -> Array:
        """What it adds, in float32."""
        return self.matrix(NumPyArithmetic(_FLOAT32)) * np.float32(self.scale)

    def norm(self) -> float:
        """See `Update`."""
        return float(np.linalg.norm(self.dense()))

    def svd(self, rank: int) -> tuple[Array, Array, Array]:
        """U (out, k), S (k,), Vt (k, in) of what it adds, with k >= `rank` leading triples: here randomized."""
        matrix = self.dense()
        width = min(rank + _OVERSAMPLING, *matrix.shape)
        basis = np.random.default_rng(0).standard_normal((matrix.shape[1], width)).astype(np.float32)
        for _ in range(_POWER_ITERATIONS):
            basis = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ basis)[0])[0]
        U, S, Vt = np.linalg.svd(matrix @ basis, full_matrices=False)
        return U, S, Vt @ basis.T


LoRA = dict[str, Update]  # layer -> the update of its weight; layer + ".bias" -> that of its bias


def updated(weight: AnyArray, updates: Sequence[tuple[Update, float]], arithmetic: Arithmetic[AnyArray]) -> AnyArray:
    """The weight with the updates at their scales: W + sum of scale * added(W).

    Each update is computed from the original weight, so the order does not matter.
    """
    result = weight
    for update, scale in updates:
        result = result + update.added(weight, arithmetic) * scale
    return result


def by_parameter(loras: Sequence[tuple[LoRA, float]]) -> dict[str, list[tuple[Update, float]]]:
    """Which updates each parameter gets, at which scale; a scale of 0 is left out."""
    found: dict[str, list[tuple[Update, float]]] = {}
    for lora, scale in loras:
        for name, update in lora.items() if scale else ():
            found.setdefault(parameter(name), []).append((update, scale))
    return found


def parameter(name: str) -> str:
    """The parameter that the update called `name` in a LoRA changes."""
    return name if name.endswith(BIAS) else f"{name}.weight"
