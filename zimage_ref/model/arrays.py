"""Types for functions that work on the arrays of both engines, NumPy's and MLX's.

The arrays of both are an `Arithmetic`. A function that takes an `ArrayT` returns the same kind of array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, TypeVar

T = TypeVar("T")
_Slice: TypeAlias = "slice[int | None, int | None, None]"


class Number(Protocol):
    """A float or an array of floats. You can scale it, and divide it by another one."""

    def __radd__(self: T, other: float, /) -> T: ...

    def __rsub__(self: T, other: float, /) -> T: ...

    def __rmul__(self: T, other: float, /) -> T: ...

    def __truediv__(self: T, other: T, /) -> T: ...


class Arithmetic(Protocol):
    """An array. Its operations are elementwise, broadcast, and give an array of the same kind."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""

    def __len__(self) -> int: ...

    def __getitem__(self: T, index: _Slice | tuple[_Slice, _Slice, _Slice, _Slice], /) -> T: ...

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
        """The sum over some axes. With `keepdims` these axes stay, with length 1."""


NumberT = TypeVar("NumberT", bound=Number)
ArrayT = TypeVar("ArrayT", bound=Arithmetic)
