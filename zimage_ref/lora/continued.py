"""The matrices that training begins with to go on from a LoRA of any kind, rank and scale.

It is exact if the new matrices can hold the old update: a larger rank, another alpha, the same kind. LoHa holds every
LoRA of its rank, and DoRA too. Else the nearest update of the new kind is taken: by singular values for a smaller rank,
by the nearest Kronecker product for LoKr (Van Loan and Pitsianis, 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from zimage_ref.formats.tensors import DTYPES, Array

from .arithmetic import NumPyArithmetic
from .kinds import Dense, DoRA, Hadamard
from .kronecker import Kronecker
from .low_rank import LowRank, concatenated
from .merge import reduced
from .trained import MAGNITUDE, TRAINED, Factors, UpdateSize, split
from .updates import Plain, Update

_FLOAT32 = NumPyArithmetic(DTYPES["f32"])
_ROUNDS = 12  # of the power iteration
_NOTHING = 1e-7  # share of the largest rank below which a rank adds nothing in float32


@dataclass(frozen=True)
class Fresh:
    """A layer before it takes over an update."""

    kind: str  # in TRAINED
    size: UpdateSize
    factors: Factors  # new matrices
    weight: Callable[[], Array]  # reads the weight (out, in), float32

    @property
    def scale(self) -> float:
        """alpha / rank of the layer."""
        return TRAINED[self.kind].scale({name: array.shape for name, array in self.factors.items()}, self.size)


def continued(update: Update, fresh: Fresh) -> tuple[Factors, float]:
    """Matrices that make `update`, or the nearest that `fresh` can hold; the share of its norm that is lost."""
    plain = update.plain or _without_base(update, fresh)
    if fresh.kind == "dora":
        return _dora(update, plain, fresh)
    if not plain.norm():
        return dict(fresh.factors), 0.0
    factors = {"lora": _low_rank, "lokr": _kronecker, "loha": _hadamard}[fresh.kind](plain, fresh)
    made = TRAINED[fresh.kind].update(factors, fresh.scale).plain
    assert made is not None  # only DoRA depends on the weight
    return factors, _lost(plain, made)


def _without_base(update: Update, fresh: Fresh) -> Plain:
    """The difference that an update makes to the weight of this model. DoRA's inner one stays as it is, for DoRA."""
    if fresh.kind == "dora" and isinstance(update, DoRA) and update.magnitude.shape[1] == 1:
        return update.update
    return Dense(update.added(fresh.weight(), _FLOAT32))


def _low_rank(plain: Plain, fresh: Fresh) -> Factors:
    """The first ranks take over; the others begin as new ones do, and add nothing."""
    near = _reduced(plain, fresh.size.rank)
    A, B = fresh.factors["lora_A"].copy(), np.zeros_like(fresh.factors["lora_B"])
    A[: near.rank], B[:, : near.rank] = near.A, near.B * np.float32(near.scale / fresh.scale)
    return {"lora_A": A, "lora_B": B}


def _reduced(plain: Plain, rank: int) -> LowRank:
    """The nearest update of at most `rank`, without ranks that add nothing: new ones can learn in their place."""
    near = reduced("", plain, rank)
    pair = near.low_rank
    assert pair is not None  # layers are matrices
    A, B = pair
    weights = np.linalg.norm(A, axis=1) * np.linalg.norm(B, axis=0)
    used = weights > _NOTHING * weights.max()
    return LowRank(A[used], B[:, used], scale=near.scale)


def _dora(update: Update, plain: Plain, fresh: Fresh) -> tuple[Factors, float]:
    """The magnitude stays, or becomes the lengths of the rows that the update made."""
    factors = _low_rank(plain, fresh)
    made = LowRank(factors["lora_A"], factors["lora_B"], scale=fresh.scale)
    if isinstance(update, DoRA) and plain is update.update:
        magnitude = update.magnitude[:, 0]
    else:
        magnitude = np.linalg.norm(fresh.weight() + plain.dense(), axis=1)
    return {**factors, MAGNITUDE: magnitude.astype(np.float32)}, _lost(plain, made)


def _hadamard(plain: Plain, fresh: Fresh) -> Factors:
    """(A1 B1) * (A2 B2). A low-rank update becomes A2 B2, and A1 B1 a matrix of ones. New columns of A are zero."""
    new, rank = fresh.factors, fresh.size.rank
    if not (isinstance(plain, Hadamard) and plain.rank <= rank):
        near = _reduced(plain, rank)
        ones = np.ones((near.shape[0], 1), np.float32), np.ones((1, near.shape[1]), np.float32)
        plain = Hadamard(*ones, near.B, near.A, scale=near.scale)
    scaled = plain.A2 * np.float32(plain.scale / fresh.scale)
    factors: Factors = {}
    for n, A, B in (("1", plain.A1, plain.B1), ("2", scaled, plain.B2)):
        left, right = np.zeros_like(new[f"hada_w{n}_a"]), new[f"hada_w{n}_b"].copy()
        left[:, : A.shape[1]], right[: len(B)] = A, B
        factors |= {f"hada_w{n}_a": left, f"hada_w{n}_b": right}
    return factors


def _kronecker(plain: Plain, fresh: Fresh) -> Factors:
    """W1 and W2, the same if they have the shapes of the new ones, each whole or as its nearest product."""
    (out1, out2), (in1, in2) = (split(side, fresh.size.factor) for side in plain.shape)
    if isinstance(plain, Kronecker) and plain.stop is None and plain.W1.shape == (out1, in1):
        W1, W2 = plain.W1 * np.float32(plain.scale), plain.W2
    else:
        W1, W2 = _nearest_kronecker(plain.dense(), (out1, out2), (in1, in2))
    factors: Factors = {}
    for name, matrix in (("lokr_w1", W1 / np.float32(fresh.scale)), ("lokr_w2", W2)):
        if name in fresh.factors:
            factors[name] = matrix
            continue
        near = _reduced(Dense(matrix), fresh.size.rank)
        left, right = fresh.factors[f"{name}_a"].copy(), np.zeros_like(fresh.factors[f"{name}_b"])
        left[:, : near.rank], right[: near.rank] = near.B, near.A
        factors |= {f"{name}_a": left, f"{name}_b": right}
    return {name: factors[name] for name in fresh.factors}


def _nearest_kronecker(matrix: Array, outs: tuple[int, int], ins: tuple[int, int]) -> tuple[Array, Array]:
    """W1 (out1, in1) and W2 (out2, in2) whose Kronecker product is nearest to `matrix` (out, in).

    They are the first singular vectors of the matrix with a row for each block.
    """
    blocks = matrix.reshape(outs[0], outs[1], ins[0], ins[1]).transpose(0, 2, 1, 3)
    rows = blocks.reshape(outs[0] * ins[0], outs[1] * ins[1])
    right = rows[np.argmax(np.einsum("ij,ij->i", rows, rows))].copy()
    left = rows @ right
    for _ in range(_ROUNDS):
        left = left / max(float(np.linalg.norm(left)), 1e-30)
        right = rows.T @ left
        length = float(np.linalg.norm(right))
        left = rows @ (right / max(length, 1e-30))
    root = np.sqrt(max(length, 1e-30))
    W1, W2 = left / max(float(np.linalg.norm(left)), 1e-30) * root, right / root
    return W1.reshape(outs[0], ins[0]).astype(np.float32), W2.reshape(outs[1], ins[1]).astype(np.float32)


def _lost(wanted: Plain, made: Plain) -> float:
    """||wanted - made|| / ||wanted||."""
    difference = concatenated([(wanted, 1.0), (made, -1.0)]) or Dense(wanted.dense() - made.dense())
    length = wanted.norm()
    return difference.norm() / length if length else 0.0
