"""The kinds that training makes: their matrices in a layer, the values that these begin with, and their update.

Each adds nothing at first, because one of its matrices is zero. DoRA begins with the lengths that the rows of
the weight have. To train another kind, list it in TRAINED, and give it a layer in `zimage_mlx.lora.trained`.

Sources of the first values: peft, tuners/lora/layer.py; LyCORIS, modules/lokr.py. Those of LoHa are our own.

Rates are relative to lora, so that the first step goes as far with each kind. Adam moves every element of the zero
matrix by the rate, whatever its gradient. So the step goes as far as the rate times the sum of the gradients' sizes.
An element's gradient is as large, on average over inputs, as the change of W that a 1 in its place would make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from zimage_ref.formats.tensors import Array

from .kinds import DoRA, Hadamard
from .kronecker import Kronecker
from .low_rank import LowRank
from .updates import Plain, Update

Factors = dict[str, Array]  # the matrices of one layer in float32, by name
Matrices = dict[str, tuple[int, ...]]  # their shapes
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]


@dataclass(frozen=True)
class UpdateSize:
    """How large the update of a layer may become."""

    rank: int
    alpha: float
    factor: int = -1  # LoKr: rows and columns of W1, at most; -1 for the split nearest to a square
    decompose_both: bool = False  # LoKr: W1 may be a product of two, as W2


@dataclass(frozen=True)
class TrainedKind:
    """A kind of update, and how it is trained."""

    title: str  # as in KINDS
    matrices: Callable[[int, int, UpdateSize], Matrices]  # out, in, size -> shapes
    update: Callable[[Factors, float], Update]  # the matrices, and alpha / rank
    draws: Mapping[str, Draw]  # first values of matrices; those without an entry are zero
    by_rank: str  # the matrix whose columns are the ranks; rank dropout lets columns rest
    last: tuple[str, ...]  # the matrices that begin with zeros, which LoRA+ lets learn faster
    rate: Callable[[Matrices], float] = lambda shapes: 1.0  # of the default learning rate of lora
    passing: int = 0  # float32 matrices of the size of a weight that its gradient makes and drops again

    def scale(self, shapes: Matrices, size: UpdateSize) -> float:
        """alpha / rank. 1 if no matrix has a rank."""
        return size.alpha / size.rank if self.by_rank in shapes or "lokr_w1_a" in shapes else 1.0

    def initial(self, shapes: Matrices, rng: np.random.Generator) -> Factors:
        """New matrices of these shapes, in float32. The magnitude of DoRA is left out: it follows from the weight."""
        return {
            name: self.draws[name](rng, shape) if name in self.draws else np.zeros(shape, np.float32)
            for name, shape in shapes.items()
            if name != MAGNITUDE
        }


MAGNITUDE = "magnitude"
_USUAL_RANK = 16  # of lora


def split(dimension: int, factor: int) -> tuple[int, int]:
    """The smaller and the larger of two numbers whose product is `dimension`, as LyCORIS takes them.

    The smaller is at most `factor`; with -1 the two are as near to each other as possible. A factor that divides
    `dimension` is one of the two. Source: factorization in lycoris/functional/general.py.
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    most = min(factor if factor > 0 else dimension, math.isqrt(dimension))
    smaller = next(n for n in range(most, 0, -1) if dimension % n == 0)
    return smaller, dimension // smaller


def _low_rank(outputs: int, inputs: int, size: UpdateSize) -> Matrices:
    return {"lora_A": (size.rank, inputs), "lora_B": (outputs, size.rank)}


def _dora(outputs: int, inputs: int, size: UpdateSize) -> Matrices:
    return {**_low_rank(outputs, inputs, size), MAGNITUDE: (outputs,)}


def _kronecker(outputs: int, inputs: int, size: UpdateSize) -> Matrices:
    """A matrix is whole if the rank is at least half of its larger side: then a product of two would be no smaller."""
    out1, out2 = split(outputs, size.factor)
    in1, in2 = split(inputs, size.factor)
    one, two = {"lokr_w1": (out1, in1)}, {"lokr_w2": (out2, in2)}
    if size.decompose_both and size.rank < max(out1, in1) / 2:
        one = {"lokr_w1_a": (out1, size.rank), "lokr_w1_b": (size.rank, in1)}
    if size.rank < max(out2, in2) / 2:
        two = {"lokr_w2_a": (out2, size.rank), "lokr_w2_b": (size.rank, in2)}
    return {**one, **two}


def _hadamard(outputs: int, inputs: int, size: UpdateSize) -> Matrices:
    left, right = (outputs, size.rank), (size.rank, inputs)
    return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}


def _uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """kaiming_uniform_ with a = sqrt(5): up to 1 / sqrt(columns)."""
    bound = 1 / math.sqrt(shape[1])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def _about_one(rank: int) -> Draw:
    """Values whose products over the ranks have the mean 1. rank: the axis of the ranks."""
    return lambda rng, shape: ((1 + rng.standard_normal(shape)) / math.sqrt(shape[rank])).astype(np.float32)


def _kronecker_rate(shapes: Matrices) -> float:
    """As far as a lora of rank 16, whatever the rank: that of whole matrices says nothing of their size."""
    (out1, _), (out2, in2) = (_sides(shapes, name) for name in ("lokr_w1", "lokr_w2"))
    left = 1 / math.sqrt(3) if "lokr_w1" in shapes else 1 / 3  # the size of W1 x, if x has the size 1
    if "lokr_w2" in shapes:
        reach = out2 * in2 * math.sqrt(out1) * left
    else:
        reach = in2 * math.sqrt(out1 * out2 * shapes["lokr_w2_b"][0] / 3) * left
    return _USUAL_RANK * out1 * out2 / math.sqrt(3) / reach


def _sides(shapes: Matrices, name: str) -> tuple[int, int]:
    """Rows and columns of a matrix that may be a product of two."""
    if name in shapes:
        return shapes[name][0], shapes[name][1]
    return shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]


def _hadamard_rate(shapes: Matrices) -> float:
    """A1 B1 has the mean square 1 + 3 / rank; with 1 it would be a lora of the same rank."""
    return 1 / math.sqrt(1 + 3 / shapes["hada_w1_b"][0])


def _kronecker_update(factors: Factors, scale: float) -> Kronecker:
    parts = {part: factors[s[1:]] for s, part in Kronecker.suffixes.items() if s[1:] in factors}
    return Kronecker.of(parts, lambda rank: 1.0 if rank is None else scale)


def _low_rank_update(factors: Factors, scale: float) -> Plain:
    return LowRank(factors["lora_A"], factors["lora_B"], scale=scale)


def _hadamard_update(factors: Factors, scale: float) -> Hadamard:
    return Hadamard(*(factors[s[1:]] for s in Hadamard.suffixes), scale=scale)


def _dora_update(factors: Factors, scale: float) -> DoRA:
    return DoRA(_low_rank_update(factors, scale), factors[MAGNITUDE][:, None])


TRAINED = {
    "lora": TrainedKind(
        LowRank.title, _low_rank, _low_rank_update, {"lora_A": _uniform}, by_rank="lora_B", last=("lora_B",),
    ),
    "lokr": TrainedKind(
        Kronecker.title, _kronecker, _kronecker_update,
        dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a"), _uniform),
        by_rank="lokr_w2_a", last=("lokr_w2", "lokr_w2_b"), rate=_kronecker_rate,
    ),
    "loha": TrainedKind(
        Hadamard.title, _hadamard, _hadamard_update,
        # A1 B1 is about 1, so at first A2 B2 learns as a lora does. LyCORIS begins with larger values: then a step is
        # so long that only a low rate is possible, and a low rate hardly changes the three matrices that are not zero
        {"hada_w1_a": _about_one(1), "hada_w1_b": _about_one(0), "hada_w2_b": _uniform},
        by_rank="hada_w1_a", last=("hada_w2_a",), rate=_hadamard_rate, passing=4,
    ),
    "dora": TrainedKind(
        DoRA.title, _dora, _dora_update, {"lora_A": _uniform}, by_rank="lora_B", last=("lora_B",), passing=2,
    ),
}  # fmt: skip
DEFAULT_KIND = "lora"
