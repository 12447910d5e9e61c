"""How the parts of a network are run: directly, or each as a program of its own, evaluated one ahead.

One evaluation may hold every array that it makes until it ends. So smaller parts take less memory. To keep the GPU
busy, a part is queued while the one before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn

from zimage_mlx.device import on_gpu

from .compiled import PerBlock

P = ParamSpec("P")
R = TypeVar("R")


class Run(Protocol):
    """Runs a part of a computation: `run(function, *args)` returns function(*args)."""

    def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """function(*args, **kwargs)."""


class RunHalf(Protocol):
    """Runs a half of a block, a function that returns its output and what a gradient needs; returns the output."""

    def __call__(self, half: Callable[P, tuple[mx.array, object]], /, *args: P.args, **kwargs: P.kwargs) -> mx.array:
        """The first of what half(*args, **kwargs) returns."""


def run_directly(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """function(*args): the plain `Run`. For the frugal one see `RunInPieces`."""
    return function(*args, **kwargs)


def output_of(half: Callable[P, tuple[mx.array, object]], /, *args: P.args, **kwargs: P.kwargs) -> mx.array:
    """The output of half(*args); the rest is never computed. The plain `RunHalf`."""
    return half(*args, **kwargs)[0]


class EvalOneAhead:
    """Evaluates what it is called with in the background, and waits for what it was called with before.

    Left lazy, all buffers of a network live at once. Evaluated and waited for block by block, the GPU idles until the
    next block is queued. This is between the two: one block is computed while the next is queued.
    """

    def __init__(self) -> None:
        self._queued: tuple[object, ...] = ()

    def __call__(self, *trees: object) -> None:
        mx.async_eval(*trees)
        before, self._queued = self._queued, trees
        if before:
            mx.eval(*before)


class Weights(Protocol):
    """How the weights of blocks come into memory and leave it."""

    def around(self, run: Callable[P, R]) -> Callable[P, R]:
        """`run`, a function of a block and more, with the weights of the block in memory while it is called."""

    def read_ahead(self) -> None:
        """Says that what was computed before the block at work is done, so there is room to read the next block."""


class Resident:
    """`Weights` that are in memory all the time."""

    def around(self, run: Callable[P, R]) -> Callable[P, R]:
        """`run` itself."""
        return run

    def read_ahead(self) -> None:
        """Does nothing."""


RESIDENT = Resident()


class RunInPieces:
    """Runs each part as a program of its own, evaluated one ahead: a drop-in replacement for `run_directly`.

    Peak memory is bounded by the intermediates of two parts, a part being smaller than a block.
    """

    def __init__(self, compiled: bool, then: Callable[[], None] = RESIDENT.read_ahead) -> None:
        """then: is called when a part is queued and all parts before it are computed."""
        self._compiled, self._eval_ahead, self._then = compiled, EvalOneAhead(), then
        self._programs: dict[object, object] = {}  # by function, which are the same few each time

    def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(function, function, *args, **kwargs)

    def output(self, half: Callable[P, tuple[mx.array, object]], /, *args: P.args, **kwargs: P.kwargs) -> mx.array:
        """The `RunHalf` of this object. A program computes all that it returns, so this one returns the output only."""

        def output_only(*args: P.args, **kwargs: P.kwargs) -> mx.array:
            return half(*args, **kwargs)[0]

        return self._run((half, "output"), output_only, *args, **kwargs)

    def block(self, block: nn.Module, *args: object) -> mx.array:
        """Runs a block, each half of it as a part; see `transformer.RunBlock`."""
        y: mx.array = block(*args, run=self.output)
        return y

    def _run(self, key: object, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """function(*args), by the program of `key`, which is made of the first function that comes with it."""
        if key not in self._programs:
            self._programs[key] = self._program(function, args) if self._compiled else function
        result = cast("Callable[P, R]", self._programs[key])(*args, **kwargs)
        self._eval_ahead(result)
        self._then()
        return result

    @staticmethod
    def _program(function: Callable[P, R], args: tuple[object, ...]) -> object:
        if args and isinstance(args[0], nn.Module):
            return PerBlock(cast("Callable[[nn.Module], R]", function))
        return mx.compile(function)


class BlockRunner:
    """Runs whole blocks, compiled on a GPU, evaluated one ahead; see `transformer.RunBlock`."""

    def __init__(self) -> None:
        self._eval_ahead, self._compiled = EvalOneAhead(), PerBlock(_call)

    @property
    def programs(self) -> int:
        """How many programs were compiled."""
        return self._compiled.programs

    def __call__(self, block: nn.Module, *args: object) -> mx.array:
        y = self._compiled(block, *args) if on_gpu() else _call(block, *args)
        self._eval_ahead(y)
        return y


def _call(block: nn.Module, /, *args: object) -> mx.array:
    y: mx.array = block(*args)
    return y
