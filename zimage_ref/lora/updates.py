"""The changes that a LoRA makes: one update for each parameter. The kinds of updates are in `kinds`."""

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

BIAS = ".bias"  # the names of updates of biases end with it
_FLOAT32 = np.dtype(np.float32)
_OVERSAMPLING, _POWER_ITERATIONS = 16, 4  # of the randomized SVD, arXiv 0909.4061
_Kind = TypeVar("_Kind", bound="Update")


class Update(ABC):
    """The change that a LoRA makes to one parameter of `shape`. Each subclass is a kind and holds all facts about it.

    `plain` and `low_rank` give the same update in a simpler form, or None if it has no such form.
    """

    title: ClassVar[str]  # the name of the kind, for people
    style: ClassVar[str] = ""  # the name of its keys, in the name of a dialect
    suffixes: ClassVar[Mapping[str, str]] = {}  # suffix of a key, in all tools -> part; the first of a part is written
    forms: ClassVar[tuple[AbstractSet[str], ...]] = ()  # the complete sets of parts, without alpha
    alpha_is_read: ClassVar[bool] = False  # whether every program reads alpha, and LyCORIS needs it

    @classmethod
    def recognises(cls, parts: AbstractSet[str]) -> bool:
        """Whether `parts` of one module are a complete update of this kind."""
        return parts - {"alpha"} in cls.forms

    @classmethod
    @abstractmethod
    def of_parts(cls, parts: Parts) -> Update:
        """The update built from `parts` that `recognises` accepts. Raises WeightError if they do not fit each other."""

    @abstractmethod
    def tensors(self) -> dict[str, Array]:
        """The parts in float32, to write into a file. alpha is among them if the kind has one."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter: (out, in) for the weight of a Linear layer."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """alpha / rank."""

    @property
    def rank(self) -> int | None:
        """The rank of its matrices. None if it has no rank."""
        return None

    @property
    def plain(self) -> Plain | None:
        """The same update as a Plain, which adds the same matrix to any weight. None if it depends on the weight."""
        return None

    @property
    def low_rank(self) -> tuple[Array, Array] | None:
        """A (rank, in) and B (out, rank) if it adds scale * B A, else None."""
        return None

    @abstractmethod
    def added(self, weight: AnyArray, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """The matrix that it adds to `weight` (out, in), in the precision of `arithmetic`."""

    @abstractmethod
    def norm(self) -> float:
        """The Frobenius norm of the matrix that it adds. For DoRA, the norm of the update inside."""

    @abstractmethod
    def folded(self: _Kind) -> _Kind:
        """The same update with scale 1. The scale is multiplied into its numbers."""

    @abstractmethod
    def rows(self: _Kind, start: int, stop: int) -> _Kind:
        """The update of the rows from `start` to `stop` of the weight."""

    def split(self: _Kind, count: int) -> list[_Kind]:
        """The updates of `count` equal shares of the rows. Use it for layers that a file holds as one fused module."""
        share = self.shape[0] // count
        return [self.rows(i * share, (i + 1) * share) for i in range(count)]

    def same_product(self, other: Update) -> bool:
        """Whether both are low-rank and have the same product B A. Their scales may differ."""
        if self.low_rank is None or other.low_rank is None or self.shape != other.shape:
            return False
        # Multiplying a random vector shows whether two products differ, without computing them
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
        """The matrix, of `shape`, that is multiplied by the scale and added."""

    def added(self, weight: AnyArray, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """scale * matrix."""
        return self.matrix(arithmetic) * self.scale

    def scaled(self, factor: float) -> Plain:
        """The same update at `factor` times its scale."""
        return replace(self, scale=self.scale * factor)

    def dense(self) -> Array:
        """The matrix that it adds, in float32."""
        return self.matrix(NumPyArithmetic(_FLOAT32)) * np.float32(self.scale)

    def norm(self) -> float:
        """See `Update`."""
        return float(np.linalg.norm(self.dense()))

    def svd(self, rank: int) -> tuple[Array, Array, Array]:
        """The SVD of the matrix that it adds: U (out, k), S (k,), Vt (k, in) with k >= `rank`. Here: randomized SVD."""
        matrix = self.dense()
        width = min(rank + _OVERSAMPLING, *matrix.shape)
        basis = np.random.default_rng(0).standard_normal((matrix.shape[1], width)).astype(np.float32)
        for _ in range(_POWER_ITERATIONS):
            basis = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ basis)[0])[0]
        U, S, Vt = np.linalg.svd(matrix @ basis, full_matrices=False)
        return U, S, Vt @ basis.T


LoRA = dict[str, Update]  # layer -> the update of its weight; layer + ".bias" -> the update of its bias


def updated(weight: AnyArray, updates: Sequence[tuple[Update, float]], arithmetic: Arithmetic[AnyArray]) -> AnyArray:
    """The weight with the updates at their scales: W + sum of scale * added(W).

    Each update is computed from the original weight, so the order does not matter.
    """
    result = weight
    for update, scale in updates:
        result = result + update.added(weight, arithmetic) * scale
    return result


def by_parameter(loras: Sequence[tuple[LoRA, float]]) -> dict[str, list[tuple[Update, float]]]:
    """Parameter -> its updates and their scales. LoRAs with scale 0 are left out."""
    found: dict[str, list[tuple[Update, float]]] = {}
    for lora, scale in loras:
        for name, update in lora.items() if scale else ():
            found.setdefault(parameter(name), []).append((update, scale))
    return found


def parameter(name: str) -> str:
    """The parameter that is changed by the update with the key `name` in a LoRA."""
    return name if name.endswith(BIAS) else f"{name}.weight"
