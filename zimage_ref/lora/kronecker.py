"""LoKr, W' = W + s W1 (x) W2. W1 and W2 are whole matrices, or products of two.

Source: arXiv 2309.14859; LyCORIS, modules/lokr.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from zimage_ref.formats.tensors import Array

from .arithmetic import AnyArray, Arithmetic
from .parts import Parts
from .updates import Plain

_HALVES = ("W1", "W2")


@dataclass(frozen=True)
class Kronecker(Plain):
    """s W1 (x) W2, or some of its rows."""

    title = "LoKr"
    style = "LoKr"
    alpha_is_read = True
    suffixes: ClassVar[Mapping[str, str]] = {
        f".lokr_w{n}{end}": f"W{n}{x}" for n in "12" for end, x in (("", ""), ("_a", "a"), ("_b", "b"))
    }
    forms = ({"W1", "W2"}, {"W1", "W2a", "W2b"}, {"W1a", "W1b", "W2"}, {"W1a", "W1b", "W2a", "W2b"})

    W1: Array  # (out1, in1) float32
    W2: Array  # (out2, in2) float32; out1 out2 = out, in1 in2 = in
    start: int = 0
    stop: int | None = None
    products: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)  # W1 or W2 -> its two factors, if it has

    @classmethod
    def of(cls, matrices: Mapping[str, Array], scale: Callable[[int | None], float]) -> Kronecker:
        """Made from the matrices by part. scale: gives the scale from the rank, None if both are whole."""
        products = {name: (matrices[f"{name}a"], matrices[f"{name}b"]) for name in _HALVES if name not in matrices}
        W1, W2 = (matrices[n] if n in matrices else products[n][0] @ products[n][1] for n in _HALVES)
        return cls(W1, W2, products=products, scale=scale(_rank(products)))

    @classmethod
    def of_parts(cls, parts: Parts) -> Kronecker:
        """Made from W1 and W2. Each is stored whole or as a product of two."""
        matrices: dict[str, Array] = {}
        for name in _HALVES:
            if name in parts:
                matrices[name] = parts.array(name)
            else:
                matrices[f"{name}a"], matrices[f"{name}b"] = parts.factors(f"{name}a", f"{name}b")
        return cls.of(matrices, parts.scale)

    def tensors(self) -> dict[str, Array]:
        """W1 and W2, each whole or as its factors, and alpha. Rows that are no Kronecker product become a difference.

        The alpha of whole matrices has no effect: the scale is multiplied into W1.
        """
        if self.stop is not None:
            return {"D": np.kron(self.folded().W1, self.W2)[self.start : self.stop]}
        whole = self if self.products else self.folded()
        found: dict[str, Array] = {}
        for name, matrix in (("W1", whole.W1), ("W2", whole.W2)):
            if name in self.products:
                found[f"{name}a"], found[f"{name}b"] = self.products[name]
            else:
                found[name] = matrix
        return {**found, "alpha": np.array(whole.scale * (self.rank or 1), np.float32)}

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        stop = len(self.W1) * len(self.W2) if self.stop is None else self.stop
        return stop - self.start, self.W1.shape[1] * self.W2.shape[1]

    @property
    def rank(self) -> int | None:
        """The rank of W2, or of W1 if W2 is whole. None if both are whole."""
        return _rank(self.products)

    def matrix(self, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """W1 (x) W2."""
        product = arithmetic.kron(arithmetic.array(self.W1), arithmetic.array(self.W2))
        return product[self.start : self.stop]

    def folded(self) -> Kronecker:
        """W1 multiplied by the scale."""
        scale, products = np.float32(self.scale), dict(self.products)
        if "W1" in products:
            products["W1"] = (products["W1"][0] * scale, products["W1"][1])
        return replace(self, W1=self.W1 * scale, products=products, scale=1.0)

    def rows(self, start: int, stop: int) -> Kronecker:
        """Rows of W1 if the slice consists of whole copies of W2, else rows of the product."""
        start, stop, height = self.start + start, self.start + stop, len(self.W2)
        if start % height or stop % height:
            return replace(self, start=start, stop=stop)
        own, products = slice(start // height, stop // height), dict(self.products)
        if "W1" in products:
            products["W1"] = (products["W1"][0][own], products["W1"][1])
        return replace(self, W1=self.W1[own], start=0, stop=None, products=products)


def _rank(products: Mapping[str, tuple[Array, Array]]) -> int | None:
    """The rank that divides alpha: that of W2 if W1 and W2 are products."""
    return next((products[name][0].shape[1] for name in reversed(_HALVES) if name in products), None)
