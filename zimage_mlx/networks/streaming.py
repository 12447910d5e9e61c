"""Networks whose weights stay in their file: those of a block are read when it is needed, and dropped after use.

While a block is computed, one thread reads the next. A block is in memory before the GPU's work names it, because Metal
ends work that waits for a disk. Files are read, not mapped: a disk that fails raises an error, and no pages of the file
stay in the process.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zimage_mlx.device import on_gpu
from zimage_ref.formats.quantize import Quantization, QuantizedTensor
from zimage_ref.formats.tensors import BFLOAT16, Tensor, Tensors
from zimage_ref.model.parameters import EMBEDDING, block_of
from zimage_ref.model.quantization import covers

from .parameters import Parameters
from .quantized import QuantizedLinear
from .tree import find, replace
from .weights import (
    PARTS,
    READS_ON_CPU,
    check_names,
    check_shape,
    filled,
    for_mlx,
    from_stored,
    in_layout,
    load_some,
    quantized_layer,
)

P = ParamSpec("P")
R = TypeVar("R")
# one for the life of the process: what MLX keeps for the stream of a thread outlives the thread
_READER = ThreadPoolExecutor(1, "blocks")


@dataclass
class _Slot:
    """The place of one parameter. `make` computes it when the block has arrived; None: it is read."""

    module: nn.Module
    key: str
    absent: mx.array
    make: Callable[[], mx.array] | None = None


@dataclass
class _Job:
    """A block that is being read."""

    block: str
    result: Future[Parameters] = field(init=False)
    cancelled: bool = False

    def cancel(self) -> None:
        """Ends the reading after the tensor at hand, and waits for that. An error is of no interest any more."""
        self.cancelled = True
        self.result.exception()


class Stream:
    """`running.Weights` that are read when they are needed. `open` is called first, once, and `close` at the end."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}  # block -> name -> tensor
        self._slots: dict[str, dict[str, _Slot]] = {}  # block -> name of the parameter -> its place
        self._derived: dict[str, list[_Slot]] = {}
        self._names: dict[int, str] = {}  # id of a block's module -> its name
        self._order: list[str] = []
        self._seen: dict[tuple[str, str], str] = {}  # two blocks, one after the other -> the block after them
        self._before, self._now = "", ""  # the latest two blocks
        self._stays: Parameters = {}  # the arrays of the block at work, if it comes again
        self._job: _Job | None = None
        self._staging = np.empty(0, np.uint8)

    def open(
        self, model: nn.Module, tensors: Tensors, dtype: mx.Dtype, quantization: Quantization | None, unpack: bool
    ) -> None:
        """Loads what is in no block, and puts placeholders into the blocks of `model`. Arguments: see `weights.load`.

        Every tensor of a block must be streamable. Raises WeightError if names or shapes differ.
        """
        check_names(model, tensors)
        self._dtype, self._quantization = dtype, quantization
        resident = {name: tensor for name, tensor in tensors.items() if not block_of(name)}
        if EMBEDDING in resident:
            replace(model, [(EMBEDDING.removesuffix(".weight"), RowsOnDemand(resident.pop(EMBEDDING), dtype))])
        load_some(model, resident, dtype, quantization)
        self._order = list(dict.fromkeys(filter(None, map(block_of, tensors))))
        # a quantized layer takes the place of another one, with a bias of its own: so all of them come first
        for name, tensor in sorted(tensors.items(), key=lambda item: not isinstance(item[1], QuantizedTensor)):
            if block := block_of(name):
                self._tensors.setdefault(block, {})[name] = tensor
                self._slots.setdefault(block, {}).update(self._absent(model, name, tensor, unpack))
        self._names = {id(find(model, block)): block for block in self._order}

    def close(self) -> None:
        """Forgets the model, and waits for what is being read."""
        if self._job:
            self._job.cancel()
        self._job, self._stays = None, {}
        for table in (self._slots, self._derived, self._names):  # else the model and this object hold each other
            table.clear()

    def derive(self, name: str, module: nn.Module, key: str, make: Callable[[], mx.array]) -> None:
        """From here on, `module[key]` is what `make` computes each time that the block of `name` has arrived."""
        slot = _Slot(module, key, _absent(module[key].shape, module[key].dtype), make)
        module[key] = slot.absent
        self._derived.setdefault(block_of(name), []).append(slot)

    def derive_nothing(self) -> None:
        """Takes back every `derive`."""
        self._derived.clear()

    def around(self, run: Callable[P, R]) -> Callable[P, R]:
        """`run`, a function of a block and more, with the weights of the block in memory while it is called."""

        def with_weights(*args: P.args, **kwargs: P.kwargs) -> R:
            block = self._names[id(args[0])]
            self._arrive(block)
            try:
                result = run(*args, **kwargs)
                self.read_ahead()
                return result
            finally:
                for slot in self._all_slots(block):
                    slot.module[slot.key] = slot.absent

        return with_weights

    def read_ahead(self) -> None:
        """Begins to read the block that will most likely be the next one, unless that was begun already."""
        if self._job is None and not self._stays:
            following = self._seen.get((self._before, self._now)) or self._neighbour()
            if following == self._now and not self._derived.get(following):
                self._stays = {name: slot.module[slot.key] for name, slot in self._slots[following].items()}
            else:
                self._job = self._begin(following)

    def _arrive(self, block: str) -> None:
        """Puts the weights of `block` in their places, and computes those that are derived from them."""
        arrays = self._stays if block == self._now else {}
        self._stays = {}
        if not arrays:
            if self._job and self._job.block != block:
                self._job.cancel()
                self._job = None
            job = self._job or self._begin(block)
            self._job = None
            arrays = self._converted(block, job.result.result())
        self._seen[self._before, self._now] = block
        self._before, self._now = self._now, block
        for name, slot in self._slots[block].items():
            slot.module[slot.key] = arrays.pop(name)
        for slot in self._derived.get(block, ()):
            assert slot.make is not None
            slot.module[slot.key] = slot.make()
            mx.eval(slot.module[slot.key])  # one at a time, so that memory holds one in float32

    def _all_slots(self, block: str) -> chain[_Slot]:
        return chain(self._slots[block].values(), self._derived.get(block, ()))

    def _neighbour(self) -> str:
        """The next block in the order of the file, or the one before if the blocks came backwards."""
        places = {block: place for place, block in enumerate(self._order)}
        back = places.get(self._before, -1) > places[self._now] > 0
        return self._order[(places[self._now] + (-1 if back else 1)) % len(self._order)]

    def _absent(self, model: nn.Module, name: str, tensor: Tensor, unpack: bool) -> dict[str, _Slot]:
        """Placeholders in the places of a tensor, whose shape must fit."""
        path, _, key = name.rpartition(".")
        check_shape(name, tensor.shape, find(model, path)[key].shape)
        how = tensor.quantization if isinstance(tensor, QuantizedTensor) else self._quantization
        if how is None or not (isinstance(tensor, QuantizedTensor) or covers(how, name, tensor.shape)):
            return {name: _placed(find(model, path), key, _absent(tensor.shape, self._dtype))}
        rows, columns = tensor.shape
        groups = (rows, columns // how.group_size)
        shapes = dict(zip(PARTS, ((rows, columns * how.bits // 32), groups, groups), strict=True))
        parts = {p: _absent(s, mx.uint32 if p == "weight" else self._dtype) for p, s in shapes.items()}
        _, layer = quantized_layer(model, name, tensor.shape, how, parts)
        if isinstance(layer, QuantizedLinear) and not unpack:
            layer.keep_packed()
        replace(model, [(path, layer)])
        return {f"{path}.{part}": _placed(layer, part, array) for part, array in parts.items()}

    def _begin(self, block: str) -> _Job:
        job = _Job(block)
        job.result = _READER.submit(self._read, job)
        return job

    def _read(self, job: _Job) -> Parameters:
        """Reads a block, in the reader's thread, and converts what the CPU may convert: casts give the same bytes."""
        arrays: Parameters = {}
        for name, tensor in self._tensors[job.block].items():
            for parameter, stored in _parameters(name, tensor).items():
                if job.cancelled:
                    return {}
                arrays[parameter] = array = self._read_tensor(stored)
                if READS_ON_CPU:
                    arrays[parameter] = array = self._cast(array)
                    mx.eval(array)
            if not on_gpu():
                self._quantize(name, tensor, arrays)
        return arrays

    def _read_tensor(self, tensor: Tensor) -> mx.array:
        """The data of a streamable tensor as its file has it, bfloat16 maybe as uint16."""
        assert tensor.span is not None
        if READS_ON_CPU and for_mlx(tensor):
            return filled(tensor, tensor.span.read_into)
        if self._staging.nbytes < tensor.nbytes:  # memory that was used before is faster than new memory
            self._staging = np.empty(tensor.nbytes, np.uint8)
        room = self._staging[: tensor.nbytes]
        tensor.span.read_into(room.data)
        return mx.array(room.view(np.uint16 if tensor.dtype == BFLOAT16 else tensor.dtype).reshape(tensor.shape))

    def _converted(self, block: str, arrays: Parameters) -> Parameters:
        """The parameters of a block by name, from what was read: what is left to convert is converted."""
        for name, tensor in self._tensors[block].items() if on_gpu() else ():
            self._quantize(name, tensor, arrays)
        return {name: self._cast(array) for name, array in arrays.items()}

    def _quantize(self, name: str, tensor: Tensor, arrays: Parameters) -> None:
        """Puts the three parts in the place of a float matrix in `arrays`, if it is to be quantized."""
        how = self._quantization
        if how is None or isinstance(tensor, QuantizedTensor) or not covers(how, name, tensor.shape):
            return
        made = mx.quantize(self._cast(arrays.pop(name)), group_size=how.group_size, bits=how.bits)
        mx.eval(made)  # one at a time, so that memory holds one as it was read
        arrays |= {f"{name.removesuffix('weight')}{part}": a for part, a in zip(PARTS, made, strict=True)}

    def _cast(self, array: mx.array) -> mx.array:
        stream = mx.cpu if READS_ON_CPU else None
        if array.dtype == mx.uint16:
            array = array.view(mx.bfloat16, stream=stream)
        if array.dtype == self._dtype or not mx.issubdtype(array.dtype, mx.floating):
            return array
        return array.astype(self._dtype, stream=stream)


class RowsOnDemand(nn.Module):
    """An embedding whose table stays in its file: each call reads the rows that it needs."""

    def __init__(self, tensor: Tensor, dtype: mx.Dtype) -> None:
        super().__init__()
        self._tensor, self._dtype = tensor, dtype

    def __call__(self, ids: mx.array) -> mx.array:
        """ids of any shape -> (*ids.shape, width)."""
        wanted, places = np.unique(np.array(ids), return_inverse=True)
        return self._table(wanted.tolist())[mx.array(places.reshape(ids.shape).astype(np.uint32))]

    def _table(self, wanted: list[int]) -> mx.array:
        """The rows `wanted`, (n, width)."""
        if not isinstance(self._tensor, QuantizedTensor):
            return self._rows(self._tensor, wanted)
        how = self._tensor.quantization
        packed, scales, biases = (self._rows(part, wanted) for part in self._tensor.parts.values())
        return mx.dequantize(packed, scales, biases, group_size=how.group_size, bits=how.bits)

    def _rows(self, tensor: Tensor, wanted: list[int]) -> mx.array:
        width, dtype = tensor.shape[1], tensor.dtype
        rows = np.empty((len(wanted), width), dtype)
        assert tensor.span is not None
        for row, index in zip(rows, wanted, strict=True):
            tensor.span.read_into(row.view(np.uint8).data, index * width * dtype.itemsize)
        return in_layout(from_stored(rows), self._dtype)


def _parameters(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a parameter, by the names that they get in a module."""
    if not isinstance(tensor, QuantizedTensor):
        return {name: tensor}
    return {f"{name.removesuffix('weight')}{part}": stored for part, stored in tensor.parts.items()}


def _absent(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array of `shape` that takes no memory. If it were computed with, the result would be NaN."""
    nothing = mx.array(float("nan"), dtype) if mx.issubdtype(dtype, mx.floating) else mx.array(0, dtype)
    return mx.broadcast_to(nothing, shape)


def _placed(module: nn.Module, key: str, array: mx.array) -> _Slot:
    module[key] = array
    return _Slot(module, key, array)
