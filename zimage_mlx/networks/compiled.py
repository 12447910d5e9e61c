"""Compiled functions: elementwise operations in one kernel, and one program for all blocks of a network.

Programs of blocks take the weights as arguments, so blocks of one structure share a program. MLX traces it once for
each shape. Compiled one by one, a network's thirty blocks would be thirty traces and thirty programs. Compiled as one
program, a network would be one evaluation, which may hold the arrays of all its blocks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, Generic, ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zimage_mlx.device import on_gpu

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, its elementwise operations fused into one kernel on a GPU.

    Not on a CPU, where compiling needs a C++ compiler at run time and takes longer than it saves.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def fused_on_gpu(*args: P.args, **kwargs: P.kwargs) -> R:
        return (compiled if on_gpu() else function)(*args, **kwargs)

    return fused_on_gpu


class PerBlock(Generic[M, P, R]):
    """`function(block, *args)`, compiled; all blocks of one structure share the program.

    A structure is the layers of a block, their types, and the parameters that train: plain, quantized and
    with LoRAs are three. `function` may use nothing of the block but its parameters and its structure. args are trees
    of arrays or constants. What trains must not change during the life of this object.
    """

    def __init__(self, function: Callable[Concatenate[M, P], R]) -> None:
        self._function = function
        self._programs: dict[Hashable, Callable[Concatenate[list[mx.array], P], R]] = {}
        self._slots: dict[int, _Slots] = {}  # by id: modules are dicts, which have no hash; slots keep them alive
        self._tracing: tuple[M, _Slots] | None = None

    @property
    def programs(self) -> int:
        """How many were compiled: one for each structure (and again, within MLX, for each shape)."""
        return len(self._programs)

    def __call__(self, block: M, *args: P.args, **kwargs: P.kwargs) -> R:
        slots = self._slots.get(id(block))
        if slots is None or slots.stale:
            slots = self._slots[id(block)] = _Slots.of(block)
        if slots.structure not in self._programs:
            self._programs[slots.structure] = mx.compile(self._trace)
        self._tracing = block, slots  # `_trace` reads this, if MLX has to trace for this call
        try:
            return self._programs[slots.structure](slots.arrays, *args, **kwargs)
        finally:
            self._tracing = None

    def _trace(self, arrays: list[mx.array], /, *args: P.args, **kwargs: P.kwargs) -> R:
        assert self._tracing is not None
        block, slots = self._tracing
        own = slots.arrays
        slots.fill(arrays)
        try:
            return self._function(block, *args, **kwargs)
        finally:
            slots.fill(own)


@dataclass(frozen=True)
class _Slots:
    """The places of a block's arrays. They are found once and read at each call."""

    structure: Hashable
    homes: list[tuple[nn.Module, str]]  # module and attribute of each parameter
    links: list[tuple[nn.Module, str, int | None, nn.Module]]  # owner, attribute, place in its list, and who is there

    @classmethod
    def of(cls, block: nn.Module) -> _Slots:
        homes, kinds = [], []
        links: list[tuple[nn.Module, str, int | None, nn.Module]] = []
        for name, module in block.named_modules():
            homes += [(module, key) for key, value in module.items() if isinstance(value, mx.array)]
            kinds.append((name, type(module).__name__, getattr(module, "_scale", None), getattr(module, "bits", None)))
            for key, value in module.items():
                if isinstance(value, nn.Module):
                    links.append((module, key, None, value))
                elif isinstance(value, list):
                    links += [(module, key, i, part) for i, part in enumerate(value) if isinstance(part, nn.Module)]
        trains = tuple(dict(tree_flatten(block.trainable_parameters())))
        return cls((tuple(kinds), trains), homes, links)

    @property
    def stale(self) -> bool:
        """Whether a layer of the block was replaced since."""
        for owner, key, place, module in self.links:
            if (owner[key] if place is None else owner[key][place]) is not module:
                return True
        return False

    @property
    def arrays(self) -> list[mx.array]:
        """The parameters as they are now."""
        return [module[key] for module, key in self.homes]

    def fill(self, arrays: Sequence[mx.array]) -> None:
        """Puts other arrays in their place."""
        for (module, key), array in zip(self.homes, arrays, strict=True):
            module[key] = array
