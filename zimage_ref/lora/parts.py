"""The tensors of one module in a LoRA file, made into one update: complete, of fitting shapes, finite, scaled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zimage_ref.errors import WeightError, listing
from zimage_ref.formats.tensors import DTYPE_NAMES, DTYPES, FLOATS, Array, Tensor, cast

from .updates import LARGEST, Dense, DoRA, Hadamard, Kronecker, LowRank, Plain, Update

# Each way to be complete: the parts that a module has, besides alpha, magnitude and bias
_FORMS = (
    {"A", "B"}, {"D"}, {"W1", "W2"}, {"W1", "W2a", "W2b"}, {"W1a", "W1b", "W2"}, {"W1a", "W1b", "W2a", "W2b"},
    {"H1a", "H1b", "H2a", "H2b"},
)  # fmt: skip
_EXTRAS = {"alpha", "magnitude", "bias"}


@dataclass(frozen=True)
class Parts:
    """Tensors of one module: part -> (key in the file, tensor)."""

    path: Path
    module: str
    tensors: Mapping[str, tuple[str, Tensor]]

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def key(self, part: str) -> str:
        """What the file calls the part."""
        return self.tensors[part][0]

    @property
    def keys(self) -> str:
        """What the file calls all parts."""
        return listing(key for key, _ in self.tensors.values())

    def error(self, fact: str) -> WeightError:
        """An error about this file."""
        return WeightError(f"{self.path}: {fact}")

    def array(self, part: str, ndim: int | None = 2) -> Array:
        """The part in float32."""
        key, tensor = self.tensors[part]
        if DTYPE_NAMES[tensor.dtype] not in FLOATS:
            raise self.error(f"{key} holds {DTYPE_NAMES[tensor.dtype]}, not floating point numbers")
        if ndim is not None and len(tensor.shape) != ndim:
            raise self.error(f"{key} has shape {tensor.shape}, which does not fit a Linear layer")
        values = cast(tensor.read(), DTYPES["f32"])
        if not (np.abs(values) <= LARGEST).all():  # also where they are NaN
            raise self.error(
                f"{key} holds numbers that are not finite, or beyond {LARGEST:g}: the file is damaged, "
                "or its training failed"
            )
        return values

    def number(self, part: str) -> float:
        """The part, a single number."""
        key, tensor = self.tensors[part]
        if tensor.size != 1:
            raise self.error(f"{key} has shape {tensor.shape} where one number belongs")
        return float(self.array(part, ndim=None).reshape(()))


def update_of(parts: Parts, default_scale: Callable[[str, int], float]) -> Update | None:
    """What the parts of a module, all but its bias, do to its weight; None if there is nothing but a bias.

    `default_scale` gives the scale of a module at a rank where the file has no alpha key.
    """
    form = parts.tensors.keys() - _EXTRAS
    if not form and "alpha" not in parts and "magnitude" not in parts:
        return None
    if form not in _FORMS:
        raise parts.error(f"{parts.module} has only {parts.keys}: the other half is missing")
    plain = _plain(parts, form, default_scale)
    return DoRA(plain, _magnitude(parts, plain.shape)) if "magnitude" in parts else plain


def bias_of(parts: Parts) -> Dense:
    """What the file adds to the module's bias."""
    return Dense(parts.array("bias", ndim=1))


def _plain(parts: Parts, form: set[str], default_scale: Callable[[str, int], float]) -> Plain:
    if form == {"D"}:
        if "alpha" in parts:
            raise parts.error(f"{parts.key('alpha')} belongs to no low-rank matrices: a full difference has no alpha")
        return Dense(parts.array("D", ndim=None))
    arrays = {part: parts.array(part) for part in form}
    for left, right in (("B", "A"), ("W1a", "W1b"), ("W2a", "W2b"), ("H1a", "H1b"), ("H2a", "H2b")):
        if left in arrays and (arrays[left].shape[1] != len(arrays[right]) or not len(arrays[right])):
            raise parts.error(
                f"{parts.key(left)} {arrays[left].shape} and {parts.key(right)} {arrays[right].shape} "
                "do not multiply: they share no rank"
            )
    rank = next((len(arrays[p]) for p in ("A", "H1b", "W2b", "W1b") if p in arrays), None)
    scale = 1.0 if rank is None else _scale(parts, rank, default_scale)
    if form == {"A", "B"}:
        return LowRank(arrays["A"], arrays["B"], scale)
    if "H1a" in form:
        hadamard = Hadamard(arrays["H1a"], arrays["H1b"], arrays["H2a"], arrays["H2b"], scale)
        if hadamard.shape != (len(hadamard.A2), hadamard.B2.shape[1]):
            keys = " and ".join(listing(parts.key(f"H{n}{x}") for x in "ab") for n in "12")
            raise parts.error(f"{keys} make matrices of different shapes")
        return hadamard
    W1, W2 = (arrays[w] if w in arrays else arrays[f"{w}a"] @ arrays[f"{w}b"] for w in ("W1", "W2"))
    return Kronecker(W1, W2, scale)


def _scale(parts: Parts, rank: int, default_scale: Callable[[str, int], float]) -> float:
    return parts.number("alpha") / rank if "alpha" in parts else default_scale(parts.module, rank)


def _magnitude(parts: Parts, shape: tuple[int, ...]) -> Array:
    """(out, 1) or (1, in); PEFT writes (out,)."""
    magnitude = parts.array("magnitude", ndim=None)
    if magnitude.shape == shape[:1]:
        magnitude = magnitude[:, None]
    if len(shape) != 2 or magnitude.shape not in ((shape[0], 1), (1, shape[1])):
        raise parts.error(f"{parts.key('magnitude')} has shape {magnitude.shape}, which does not fit a layer {shape}")
    return magnitude


def split(parts: Parts, update: Update, count: int) -> list[Update]:
    """The updates of `count` layers whose weights are stacked, in equal shares of the rows, in one fused module."""
    if count == 1:
        return [_unpadded(update)]
    total = update.shape[0]
    if total % count:
        raise parts.error(f"{parts.module} has {total} rows, which are not those of {count} layers")
    if isinstance(update, DoRA) and update.magnitude.shape[0] == 1 < count:
        raise parts.error(f"{parts.key('magnitude')} normalises columns of fused layers, which cannot be split")
    share = total // count
    chunks = [update.rows(i * share, (i + 1) * share) for i in range(count)]
    low_rank = [chunk for chunk in chunks if isinstance(chunk, LowRank)]
    return [_unpadded(chunk) for chunk in _own_ranks(low_rank) or chunks]


def _unpadded(update: Update) -> Update:
    """Less the trailing ranks that are zero on both sides, which z-image-train's one rank for all modules asks for."""
    if not isinstance(update, LowRank):
        return update
    used = np.flatnonzero(update.A.any(axis=1) | update.B.any(axis=0))
    rank = int(used[-1]) + 1 if len(used) else 1
    return LowRank(update.A[:rank], update.B[:, :rank], update.scale) if rank < update.rank else update


def _own_ranks(chunks: list[LowRank]) -> list[LowRank]:
    """The chunks less the ranks that they do not use, where each has a slice of the fused rank to itself, else []."""
    count = len(chunks)
    if not chunks or chunks[0].rank % count:
        return []
    own = chunks[0].rank // count
    slices = [slice(i * own, (i + 1) * own) for i in range(count)]
    if any(np.delete(chunk.B, np.r_[at], axis=1).any() for chunk, at in zip(chunks, slices, strict=True)):
        return []
    return [LowRank(chunk.A[at], chunk.B[:, at], chunk.scale) for chunk, at in zip(chunks, slices, strict=True)]


def same_matrices(first: Update, second: Update) -> bool:
    """Whether two low-rank updates have the same product B A, whatever their scales. Decided on random vectors."""
    if not (isinstance(first, LowRank) and isinstance(second, LowRank)) or first.shape != second.shape:
        return False
    x = np.random.default_rng(0).standard_normal((first.shape[1], 4)).astype(np.float32)
    one, two = (update.B @ (update.A @ x) for update in (first, second))
    return bool(np.allclose(one, two, rtol=1e-3, atol=1e-3 * float(np.abs(one).max(initial=0))))
