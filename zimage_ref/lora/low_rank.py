"""LoRA itself, W' = W + s B A. Training makes this kind, and engines can apply it beside a layer.

Source: arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from zimage_ref.formats.tensors import Array

from .arithmetic import AnyArray, Arithmetic
from .parts import Parts
from .updates import Plain, Update


@dataclass(frozen=True)
class LowRank(Plain):
    """s B A."""

    title = "LoRA"
    forms = ({"A", "B"},)

    A: Array  # (rank, in) float32
    B: Array  # (out, rank) float32

    @classmethod
    def of_parts(cls, parts: Parts) -> LowRank:
        """Made from A and B."""
        B, A = parts.factors("B", "A")
        return cls(A, B, scale=parts.scale(len(A)))

    def tensors(self) -> dict[str, Array]:
        """A, B and alpha."""
        return {"A": self.A, "B": self.B, "alpha": np.array(self.scale * self.rank, np.float32)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return len(self.A)

    @property
    def low_rank(self) -> tuple[Array, Array]:
        """A and B."""
        return self.A, self.B

    def matrix(self, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """B A."""
        return arithmetic.array(self.B) @ arithmetic.array(self.A)

    def norm(self) -> float:
        """||s B A||, by ||B A||^2 = tr(B^T B A A^T): its matrices are rank x rank instead of out x in."""
        square = float(np.sum((self.B.T @ self.B) * (self.A @ self.A.T), dtype=np.float64))
        return float(abs(self.scale) * max(square, 0.0) ** 0.5)

    def svd(self, rank: int) -> tuple[Array, Array, Array]:
        """All triples of singular values and vectors, exactly."""
        left, R = np.linalg.qr(self.B * np.float32(self.scale))
        right, L = np.linalg.qr(self.A.T)
        U, S, Vt = np.linalg.svd(R @ L.T)
        return left @ U, S, Vt @ right.T

    def folded(self) -> LowRank:
        """B multiplied by the scale."""
        return replace(self, B=self.B * np.float32(self.scale), scale=1.0)

    def rows(self, start: int, stop: int) -> LowRank:
        """Rows of B."""
        return replace(self, B=self.B[start:stop])

    def split(self, count: int) -> list[LowRank]:
        """The updates of `count` equal shares of the rows. Each keeps only the ranks that it uses."""
        chunks = super().split(count)
        return [chunk._trimmed() for chunk in _with_own_ranks(chunks) or chunks]

    def _trimmed(self) -> LowRank:
        """The same without the last ranks if they are zero in A and B. z-image-train pads all modules to one rank."""
        used = np.flatnonzero(self.A.any(axis=1) | self.B.any(axis=0))
        rank = int(used[-1]) + 1 if len(used) else 1
        return replace(self, A=self.A[:rank], B=self.B[:, :rank]) if rank < self.rank else self


def concatenated(updates: Sequence[tuple[Update, float]]) -> LowRank | None:
    """The sum of the updates at their scales, as one update. Its rank is the sum of their ranks.

    None if one of them is not low-rank.
    """
    low_rank = [(pair, update.scale * scale) for update, scale in updates if (pair := update.low_rank) is not None]
    if len(low_rank) < len(updates):
        return None
    A = np.concatenate([A for (A, _), _ in low_rank])
    return LowRank(A, np.concatenate([B * np.float32(scale) for (_, B), scale in low_rank], axis=1))


def _with_own_ranks(chunks: list[LowRank]) -> list[LowRank]:
    """The chunks, each with its own slice of the fused rank; an empty list unless each uses only its slice."""
    count = len(chunks)
    if chunks[0].rank % count:
        return []
    own = chunks[0].rank // count
    slices = [slice(i * own, (i + 1) * own) for i in range(count)]
    if any(np.delete(chunk.B, np.r_[at], axis=1).any() for chunk, at in zip(chunks, slices, strict=True)):
        return []
    return [replace(chunk, A=chunk.A[at], B=chunk.B[:, at]) for chunk, at in zip(chunks, slices, strict=True)]
