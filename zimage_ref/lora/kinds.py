"""The kinds of updates in LoRA files. To add a kind, write its class here and list it in KINDS.

    LoRA               W' = W + s B A                       arXiv 2106.09685
    full difference    W' = W + s D                         also of a norm or a bias
    LoKr               W' = W + s W1 (x) W2                 arXiv 2309.14859
    LoHa               W' = W + s (A1 B1) * (A2 B2)         arXiv 2108.06098
    DoRA               W' = m (W + d) / ||W + d||           d one of the above; arXiv 2402.09353
    whole parameter    W' = W_new                           `whole`; also of a norm or a bias

s = alpha / rank. Suffixes are those of LyCORIS, kohya and ComfyUI. The suffixes of LoRA differ from tool to tool: see
`spellings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from zimage_ref.errors import listing
from zimage_ref.formats.tensors import Array

from .arithmetic import AnyArray, Arithmetic
from .kronecker import Kronecker
from .low_rank import LowRank
from .parts import Parts
from .updates import Plain, Update
from .whole import Whole


@dataclass(frozen=True)
class Dense(Plain):
    """s D."""

    title = "full difference"
    style = "diff"
    suffixes: ClassVar[Mapping[str, str]] = {  # those of ComfyUI and, for norms, LyCORIS
        ".diff": "D", ".w_norm": "D", ".diff_b": "bias", ".b_norm": "bias",
    }  # fmt: skip
    forms = ({"D"},)

    D: Array  # the parameter's shape, float32

    @classmethod
    def of_parts(cls, parts: Parts) -> Dense:
        """Made from D, which has no alpha."""
        return cls(parts.stored_whole("D", cls.title))

    def tensors(self) -> dict[str, Array]:
        """D, multiplied by the scale."""
        return {"D": self.folded().D}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.D.shape

    def matrix(self, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """D."""
        return arithmetic.array(self.D)

    def norm(self) -> float:
        """See `Update`."""
        return abs(self.scale) * float(np.linalg.norm(self.D))

    def folded(self) -> Dense:
        """See `Update`."""
        return Dense(self.D * np.float32(self.scale))

    def rows(self, start: int, stop: int) -> Dense:
        """See `Update`."""
        return replace(self, D=self.D[start:stop])


@dataclass(frozen=True)
class Hadamard(Plain):
    """s (A1 B1) * (A2 B2), elementwise."""

    title = "LoHa"
    style = "LoHa"
    alpha_is_read = True
    suffixes: ClassVar[Mapping[str, str]] = {f".hada_w{n}_{x}": f"H{n}{x}" for n in "12" for x in "ab"}
    forms = ({"H1a", "H1b", "H2a", "H2b"},)

    A1: Array  # (out, rank) float32
    B1: Array  # (rank, in)
    A2: Array  # (out, rank)
    B2: Array  # (rank, in)

    @classmethod
    def of_parts(cls, parts: Parts) -> Hadamard:
        """Made from the four factors."""
        (A1, B1), (A2, B2) = parts.factors("H1a", "H1b"), parts.factors("H2a", "H2b")
        if (len(A1), B1.shape[1]) != (len(A2), B2.shape[1]):
            keys = " and ".join(listing(parts.key(f"H{n}{x}") for x in "ab") for n in "12")
            raise parts.error(f"{keys} make matrices of different shapes")
        return cls(A1, B1, A2, B2, scale=parts.scale(len(B1)))

    def tensors(self) -> dict[str, Array]:
        """The four factors and alpha."""
        factors = {"H1a": self.A1, "H1b": self.B1, "H2a": self.A2, "H2b": self.B2}
        return {**factors, "alpha": np.array(self.scale * self.rank, np.float32)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.A1.shape[0], self.B1.shape[1]

    @property
    def rank(self) -> int:
        """The rank of each of the two products."""
        return len(self.B1)

    def matrix(self, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """(A1 B1) * (A2 B2)."""
        A1, B1, A2, B2 = (arithmetic.array(factor) for factor in (self.A1, self.B1, self.A2, self.B2))
        return (A1 @ B1) * (A2 @ B2)

    def folded(self) -> Hadamard:
        """A1 multiplied by the scale."""
        return replace(self, A1=self.A1 * np.float32(self.scale), scale=1.0)

    def rows(self, start: int, stop: int) -> Hadamard:
        """Rows of A1 and A2."""
        return replace(self, A1=self.A1[start:stop], A2=self.A2[start:stop])


@dataclass(frozen=True)
class DoRA(Update):
    """m (W + d) / ||W + d|| - W. The norm runs over the axis along which m has length 1."""

    title = "DoRA"
    suffixes: ClassVar[Mapping[str, str]] = {  # those of LyCORIS, PEFT and ai-toolkit
        ".dora_scale": "magnitude", ".lora_magnitude_vector": "magnitude", ".magnitude": "magnitude",
    }  # fmt: skip

    update: Plain  # d
    magnitude: Array  # m, (out, 1) or (1, in) float32

    @classmethod
    def recognises(cls, parts: AbstractSet[str]) -> bool:
        """Whether there is a magnitude, and the other parts are a complete update of another kind."""
        return "magnitude" in parts and _kind_of(parts - {"magnitude"}) is not None

    @classmethod
    def of_parts(cls, parts: Parts) -> DoRA:
        """Made from the parts of another kind and a magnitude (out, 1), (1, in) or, as PEFT writes it, (out,)."""
        inner = update_of(parts.without("magnitude"))
        plain = inner.plain if inner else None
        if plain is None:
            raise parts.error(f"{parts.key('magnitude')} is beside matrices that have no magnitude")
        magnitude, shape = parts.array("magnitude", ndim=None), plain.shape
        if magnitude.shape == shape[:1]:
            magnitude = magnitude[:, None]
        if len(shape) != 2 or magnitude.shape not in ((shape[0], 1), (1, shape[1])):
            raise parts.error(
                f"{parts.key('magnitude')} has shape {magnitude.shape}, which does not fit a layer {shape}"
            )
        if magnitude.shape[0] == 1 < parts.layers:
            raise parts.error(f"{parts.key('magnitude')} normalises columns of fused layers, which cannot be split")
        return cls(plain, magnitude)

    def tensors(self) -> dict[str, Array]:
        """The parts of the update inside, then the magnitude."""
        return {**self.update.tensors(), "magnitude": self.magnitude}

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.update.shape

    @property
    def scale(self) -> float:
        """Of the update inside."""
        return self.update.scale

    @property
    def rank(self) -> int | None:
        """Of the update inside."""
        return self.update.rank

    def added(self, weight: AnyArray, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """m (W + d) / ||W + d|| - W."""
        target, magnitude = weight + self.update.added(weight, arithmetic), arithmetic.array(self.magnitude)
        axis = 1 if self.magnitude.shape[1] == 1 else 0
        return arithmetic.with_norms(target, magnitude, axis) - weight

    def norm(self) -> float:
        """The norm of the update inside. The norm of the whole depends on the weight."""
        return self.update.norm()

    def folded(self) -> DoRA:
        """The scale is multiplied into the update inside."""
        return replace(self, update=self.update.folded())

    def rows(self, start: int, stop: int) -> DoRA:
        """See `Update`. Works only for a magnitude (out, 1)."""
        return DoRA(self.update.rows(start, stop), self.magnitude[start:stop])


KINDS: dict[str, type[Update]] = {kind.title: kind for kind in (LowRank, Dense, Kronecker, Hadamard, DoRA, Whole)}
BIASES = {"bias", "lora_bias", "whole_bias"}  # the parts that change a bias


def update_of(parts: Parts) -> Update | None:
    """The update of a module's weight from its parts, without those of the bias. None if it has a bias only.

    Raises WeightError if no kind has these parts, or if they do not fit each other.
    """
    names = parts.tensors.keys() - BIASES
    if not names:
        return None
    kind = _kind_of(names)
    if kind is None:
        raise parts.error(f"{parts.module} has only {parts.keys}: the other half is missing")
    return kind.of_parts(parts)


def bias_of(parts: Parts) -> Update | None:
    """The update of a module's bias. None if it has none.

    PEFT's lora_bias adds s b, with the scale s of the matrices beside it (peft, tuners/lora/layer.py).
    """
    names = sorted(BIASES & parts.tensors.keys())
    if not names:
        return None
    if len(names) > 1:
        raise parts.error(f"{listing(map(parts.key, names))}: a bias is changed twice")
    change = parts.array(names[0], ndim=1)
    if names == ["whole_bias"]:
        return Whole(change)
    if names == ["lora_bias"]:
        if "A" not in parts:
            raise parts.error(f"{parts.key('lora_bias')} has no matrix beside it")
        change = change * np.float32(parts.scale(len(parts.array("A"))))
    return Dense(change)


def _kind_of(parts: AbstractSet[str]) -> type[Update] | None:
    return next((kind for kind in KINDS.values() if kind.recognises(parts)), None)
