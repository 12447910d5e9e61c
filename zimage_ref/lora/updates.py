"""What a LoRA file changes: for each parameter of the transformer, one update of a few kinds.

    low rank    W' = W + s B A                          LoRA, arXiv 2106.09685
    dense       W' = W + s D                            a full difference, also of a norm or a bias
    Kronecker   W' = W + s W1 (x) W2                    LoKr, arXiv 2309.14859
    Hadamard    W' = W + s (A1 B1) * (A2 B2)            LoHa, arXiv 2108.06098
    DoRA        W' = m (W + d) / ||W + d||              d one of the above; arXiv 2402.09353

These are nouns: what they add to a weight is computed by `arithmetic` here and by `zimage_mlx.lora` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zimage_ref.formats.tensors import Array

BIAS = ".bias"  # ends the names of updates of biases
LARGEST = 1e8  # no trained number comes near it, and squares of products of such numbers still fit in float32


@dataclass(frozen=True)
class LowRank:
    """s B A."""

    A: Array  # (rank, in) float32
    B: Array  # (out, rank) float32
    scale: float = 1.0  # alpha / rank

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.A)

    def rows(self, start: int, stop: int) -> LowRank:
        """The same update of some of the rows."""
        return replace(self, B=self.B[start:stop])


@dataclass(frozen=True)
class Dense:
    """s D."""

    D: Array  # the parameter's shape, float32
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parameter."""
        return self.D.shape

    def rows(self, start: int, stop: int) -> Dense:
        """The same update of some of the rows."""
        return replace(self, D=self.D[start:stop])


@dataclass(frozen=True)
class Kronecker:
    """s W1 (x) W2, or some of its rows."""

    W1: Array  # (out1, in1) float32
    W2: Array  # (out2, in2) float32; out1 out2 = out, in1 in2 = in
    scale: float = 1.0
    start: int = 0
    stop: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        stop = len(self.W1) * len(self.W2) if self.stop is None else self.stop
        return stop - self.start, self.W1.shape[1] * self.W2.shape[1]

    def rows(self, start: int, stop: int) -> Kronecker:
        """The same update of some of the rows."""
        start, stop, height = self.start + start, self.start + stop, len(self.W2)
        if start % height or stop % height:
            return replace(self, start=start, stop=stop)
        return replace(self, W1=self.W1[start // height : stop // height], start=0, stop=None)


@dataclass(frozen=True)
class Hadamard:
    """s (A1 B1) * (A2 B2), elementwise."""

    A1: Array  # (out, rank) float32
    B1: Array  # (rank, in)
    A2: Array  # (out, rank)
    B2: Array  # (rank, in)
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.A1.shape[0], self.B1.shape[1]

    @property
    def rank(self) -> int:
        """Of each of the two products."""
        return len(self.B1)

    def rows(self, start: int, stop: int) -> Hadamard:
        """The same update of some of the rows."""
        return replace(self, A1=self.A1[start:stop], A2=self.A2[start:stop])


Plain = LowRank | Dense | Kronecker | Hadamard  # what adds the same to any weight


@dataclass(frozen=True)
class DoRA:
    """m (W + d) / ||W + d|| - W, where the norm runs over the axis along which m has length 1."""

    update: Plain  # d
    magnitude: Array  # m, (out, 1) or (1, in) float32

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.update.shape

    @property
    def scale(self) -> float:
        """Of the update inside."""
        return self.update.scale

    def rows(self, start: int, stop: int) -> DoRA:
        """The same update of some of the rows. Only a magnitude (out, 1) can be split."""
        return DoRA(self.update.rows(start, stop), self.magnitude[start:stop])


Update = Plain | DoRA
LoRA = dict[str, Update]  # layer -> the update of its weight; layer + ".bias" -> that of its bias


def rank(update: Update) -> int | None:
    """The rank of low-rank and Hadamard updates, also inside DoRA."""
    plain = update.update if isinstance(update, DoRA) else update
    return plain.rank if isinstance(plain, LowRank | Hadamard) else None


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
