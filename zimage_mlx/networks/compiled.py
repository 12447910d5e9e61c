"""One compiled function for all blocks of a network, weights as arguments; and computing it block by block.

Compiling each block on its own would trace and keep thirty programs; compiling the whole network ties its memory
together. Here a program is traced once for each structure of a block (plain, quantized, with LoRA) and each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zimage_mlx.device import on_gpu

Function = TypeVar("Function", bound=Callable[..., Any])


def call(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args): the plain way to run one part of a computation. For the frugal way see `Pieces`."""
    return function(*args)


def fused(function: Function) -> Function:
    """`function`, its elementwise operations fused into one kernel on a GPU.

    Not on a CPU, where compiling needs a C++ compiler at run time and takes longer than it saves.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        return (compiled if on_gpu() else function)(*args)

    return cast(Function, call)


class PerBlock:
    """`function(block, *args)`, compiled; all blocks of one structure share the program.

    `function` may use nothing of the block but its parameters and its structure, and args are trees of arrays or
    constants. What trains is part of the structure and must not change during the life of this object.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._programs: dict[Hashable, Callable[..., Any]] = {}
        self._slots: dict[int, _Slots] = {}  # by id: modules are dicts, which have no hash; slots keep them alive
        self._tracing: tuple[nn.Module, _Slots] | None = None

    @property
    def programs(self) -> int:
        """How many were compiled: one for each structure (and again, within MLX, for each shape)."""
        return len(self._programs)

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        slots = self._slots.get(id(block))
        if slots is None or slots.stale:
            slots = self._slots[id(block)] = _Slots.of(block)
        if slots.structure not in self._programs:
            self._programs[slots.structure] = mx.compile(lambda arrays, *args: self._trace(arrays, *args))
        self._tracing = block, slots  # what a trace is made of, if this call needs one
        try:
            return self._programs[slots.structure](slots.arrays, *args)
        finally:
            self._tracing = None

    def _trace(self, arrays: list[mx.array], *args: Any) -> Any:
        assert self._tracing is not None
        block, slots = self._tracing
        own = slots.arrays
        slots.fill(arrays)
        try:
            return self._function(block, *args)
        finally:
            slots.fill(own)


@dataclass(frozen=True)
class _Slots:
    """Where the arrays of a block are: found once, read at each call."""

    structure: Hashable
    homes: list[tuple[nn.Module, str]]  # module and attribute of each parameter
    links: list[tuple[Any, Any, nn.Module]]  # container, key and module: to notice one that was replaced

    @classmethod
    def of(cls, block: nn.Module) -> _Slots:
        homes, links, kinds = [], [], []
        for name, module in block.named_modules():
            homes += [(module, key) for key, value in module.items() if isinstance(value, mx.array)]
            kinds.append((name, type(module).__name__, getattr(module, "_scale", None), getattr(module, "bits", None)))
            for key, value in module.items():
                if isinstance(value, nn.Module):
                    links.append((module, key, value))
                elif isinstance(value, list):
                    links += [(value, i, part) for i, part in enumerate(value) if isinstance(part, nn.Module)]
        trains: Any = tree_flatten(block.trainable_parameters())
        return cls((tuple(kinds), tuple(name for name, _ in trains)), homes, links)

    @property
    def stale(self) -> bool:
        """Whether a layer of the block was replaced since."""
        return any(container[key] is not module for container, key, module in self.links)

    @property
    def arrays(self) -> list[mx.array]:
        """The parameters as they are now."""
        return [module[key] for module, key in self.homes]

    def fill(self, arrays: Sequence[mx.array]) -> None:
        """Puts other arrays in their place."""
        for (module, key), array in zip(self.homes, arrays, strict=True):
            module[key] = array


class Settle:
    """Computes what it is called with, in the background, one call ahead of what is done.

    Left lazy, a network's buffers all live at once. Evaluated block by block, the GPU waits for the next block to be
    queued. Between the two, one block is being computed while the next is queued.
    """

    def __init__(self) -> None:
        self._queued: tuple[Any, ...] = ()

    def __call__(self, *arrays: Any) -> None:
        mx.async_eval(*arrays)
        before, self._queued = self._queued, arrays
        if before:
            mx.eval(*before)


class Pieces:
    """Runs the parts of a block each as a program of its own, computed one ahead of what is done.

    All that one evaluation makes on its way may live until it ends. So memory holds what two parts make on their way,
    not two blocks. Stands where `call` does.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled, self._settle = compiled, Settle()
        self._programs: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), on its way; `function` is one of the same few each time."""
        if function not in self._programs:
            wrap: Callable[[Any], Any] = PerBlock if args and isinstance(args[0], nn.Module) else mx.compile
            self._programs[function] = wrap(function) if self._compiled else function
        result = self._programs[function](*args)
        self._settle(result)
        return result


class BlockRunner:
    """Runs the blocks of a network one after the other: compiled on a GPU, computed one ahead of what is done."""

    def __init__(self) -> None:
        self._settle = Settle()
        self._compiled = PerBlock(lambda block, *args: block(*args))

    @property
    def programs(self) -> int:
        """How many programs were compiled."""
        return self._compiled.programs

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        y = self._compiled(block, *args) if on_gpu() else block(*args)
        self._settle(y)
        return y
