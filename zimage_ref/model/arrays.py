"""What the arrays of both engines have in common: the types of mathematics that is written once.

NumPy's and MLX's arrays are both an `Arithmetic`; a function of `ArrayT` returns the kind of array that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Number(Protocol):
    """A float or an array of them. It can be scaled, and divided by its like."""

    def __radd__(self: T, other: float, /) -> T: ...

    def __rsub__(self: T, other: float, /) -> T: ...

    def __rmul__(self: T, other: float, /) -> T: ...

    def __truediv__(self: T, other: T, /) -> T: ...


class Arithmetic(Protocol):
    """An array. Operations are elementwise and broadcast, and give an array of the same kind."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""

    def __len__(self) -> int: ...

    def __getitem__(self: T, index: slice[int | None, int | None, None], /) -> T: ...

    def __neg__(self: T) -> T: ...

    def __add__(self: T, other: T | float, /) -> T: ...

    def __radd__(self: T, other: float, /) -> T: ...

    def __sub__(self: T, other: T | float, /) -> T: ...

    def __rsub__(self: T, other: float, /) -> T: ...

    def __mul__(self: T, other: T | float, /) -> T: ...

    def __rmul__(self: T, other: float, /) -> T: ...

    def __truediv__(self: T, other: T | float, /) -> T: ...

    def __pow__(self: T, other: float, /) -> T: ...

    def __lt__(self: T, other: float, /) -> T: ...

    def sum(self: T, *, axis: Sequence[int], keepdims: bool) -> T:
        """The sum over some axes, which stay with length 1 if `keepdims`."""


NumberT = TypeVar("NumberT", bound=Number)
ArrayT = TypeVar("ArrayT", bound=Arithmetic)
