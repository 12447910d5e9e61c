"""Weights from disk into MLX modules: one tensor at a time, in the layout and precision that MLX wants."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from zimage_mlx import device
from zimage_ref.errors import WeightError, ZImageError, listing
from zimage_ref.formats.npz import npy_header
from zimage_ref.formats.packed import PackedTensor
from zimage_ref.formats.quantize import Quantization, QuantizedTensor
from zimage_ref.formats.tensors import BFLOAT16, Array, Tensor, Tensors
from zimage_ref.model.quantization import covers

from .convolution import Conv3x3
from .quantized import QuantizedLinear
from .tree import find

_LARGE = 1 << 20  # bytes
_READERS = 2  # threads; more were not faster
# one for the life of the process: what MLX keeps for the stream of a thread outlives the thread
_POOL = ThreadPoolExecutor(_READERS, "weights")
READS_ON_CPU = not mx.cuda.is_available()  # else arrays that the CPU makes lie on the wrong side
PARTS = ("weight", "scales", "biases")  # of a quantized layer, as `mx.quantize` returns them
_STORED = {mx.float32: "f32", mx.bfloat16: "bf16", mx.float16: "f16"}  # names of DTYPES in formats.tensors
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load(
    model: nn.Module,
    tensors: Tensors,
    dtype: mx.Dtype,
    quantization: Quantization | None = None,
    unpack: bool = True,
) -> None:
    """Fills every parameter of `model` from `tensors`, which must hold exactly these.

    Layers that are stored quantized, or that `quantization` covers, become quantized ones. Raises
    WeightError if names or shapes differ. Beside what is loaded, memory holds three tensors that are being read, never
    a second copy of the model. unpack: whether quantized weights are unpacked for products of many rows.
    """
    check_names(model, tensors)
    load_some(model, tensors, dtype, quantization)
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and not unpack:
            module.keep_packed()
        if isinstance(module, Conv3x3) and device.on_metal():
            module.mirror()


def check_names(model: nn.Module, tensors: Tensors) -> None:
    """Raises WeightError unless `tensors` are named exactly as the parameters of `model`."""
    if differing := dict(tree_flatten(model.parameters())).keys() ^ tensors.keys():
        raise WeightError(f"weights differ from the model in {listing(sorted(differing))}")


def load_some(model: nn.Module, tensors: Tensors, dtype: mx.Dtype, quantization: Quantization | None) -> None:
    """Fills the parameters of `model` that `tensors` names. See `load`."""
    expected = dict(tree_flatten(model.parameters()))
    loaded, layers = [], []
    stored = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}
    for name, tensor in stored.items():
        parts = {part: to_mlx(packed, dtype) for part, packed in tensor.parts.items()}
        mx.eval(parts)
        layers.append(quantized_layer(model, name, tensor.shape, tensor.quantization, parts))
    for name, array in read_ahead({n: t for n, t in tensors.items() if n not in stored}, dtype):
        if quantization and covers(quantization, name, tensors[name].shape):
            made = mx.quantize(array, group_size=quantization.group_size, bits=quantization.bits)
            mx.eval(made)
            parts = dict(zip(PARTS, made, strict=True))
            layers.append(quantized_layer(model, name, tensors[name].shape, quantization, parts))
            continue
        check_shape(name, array.shape, expected[name].shape)
        mx.eval(array)
        loaded.append((name, array))
    model.update_modules(tree_unflatten(layers))
    model.update(tree_unflatten(loaded))


def check_shape(name: str, shape: Sequence[int], needed: Sequence[int]) -> None:
    """Raises WeightError if the two shapes of the parameter `name` differ."""
    if tuple(shape) != tuple(needed):
        raise WeightError(f"{name} has shape {tuple(shape)}, the model needs {tuple(needed)}")


def quantized_layer(
    model: nn.Module, name: str, shape: Sequence[int], quantization: Quantization, parts: dict[str, mx.array]
) -> tuple[str, nn.Module]:
    """The name of the layer whose weight is `name`, and what takes its place: a Linear layer or an embedding.

    shape: that of the weight. parts: by PARTS.
    """
    path, (rows, columns) = name.removesuffix(".weight"), shape
    group_size, bits, old = quantization.group_size, quantization.bits, find(model, path)
    layer: nn.Module
    if isinstance(old, nn.Embedding):
        layer = nn.QuantizedEmbedding(rows, columns, group_size, bits)
    else:
        layer = QuantizedLinear(columns, rows, bias="bias" in old, group_size=group_size, bits=bits)
    layer.update(parts)
    return path, layer


def read_ahead(tensors: Tensors, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Each of `tensors` by name, as `to_mlx` makes it, the next two being read meanwhile.

    Most of the time goes into memory that is touched for the first time, one thread at a time, so two are faster.
    """
    if not READS_ON_CPU:
        yield from ((name, to_mlx(tensor, dtype)) for name, tensor in tensors.items())
        return
    waiting: deque[tuple[str, Future[mx.array | Array]]] = deque()

    def first() -> tuple[str, mx.array]:
        name, future = waiting.popleft()
        read = future.result()
        return name, in_layout(read if isinstance(read, mx.array) else from_stored(read), dtype)

    for name, tensor in tensors.items():
        waiting.append((name, _POOL.submit(_read, _decoding_to(tensor, dtype))))
        if len(waiting) > _READERS:
            yield first()
    while waiting:
        yield first()


def _read(tensor: Tensor) -> mx.array | Array:
    """The data of a tensor: a large one as MLX's own, which leaves Python to other threads while it is copied."""
    stored = tensor.read()
    if not for_mlx(tensor):
        return stored

    def copy(buffer: memoryview) -> None:
        np.copyto(np.frombuffer(buffer, stored.dtype).reshape(stored.shape), stored)

    return filled(Tensor.of(stored), copy)


def for_mlx(tensor: Tensor) -> bool:
    """Whether `filled` may make the array: it is large, and of a dtype that MLX loads. GPUs have no float64."""
    return tensor.nbytes >= _LARGE and tensor.dtype != np.float64


def filled(tensor: Tensor, fill: Callable[[memoryview], None]) -> mx.array:
    """An array of the shape and dtype of `tensor`, in memory that MLX makes and that `fill` fills, once."""
    # it is read when this returns; a stream set for a block would be set for all threads in some versions of MLX
    file = _Npy(tensor, fill)
    try:
        return cast(mx.array, mx.load(cast(BinaryIO, file), format="npy", stream=mx.cpu))
    finally:
        if file.error:  # MLX would make a RuntimeError of it
            raise file.error


class _Npy(io.RawIOBase):
    """A tensor as the .npy file that `mx.load` would read it from: MLX makes the memory, `fill` fills it once."""

    def __init__(self, tensor: Tensor, fill: Callable[[memoryview], None]) -> None:
        self._fill, self._header, self._position = fill, npy_header(tensor, 0), 0
        self.error: ZImageError | None = None

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Some of the header, or all the data, as MLX asks for them."""
        start, self._position = self._position, self._position + len(buffer)
        if self._position <= len(self._header):
            buffer[:] = self._header[start : self._position]
        else:
            try:
                self._fill(buffer)
            except ZImageError as error:  # raised by `filled`: here it would have to pass through MLX's own thread
                self.error = error
        return len(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the place of the next read, from the start."""
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only from the start")
        self._position = offset
        return offset

    def tell(self) -> int:
        """The place of the next read."""
        return self._position


def to_mlx(tensor: Tensor, dtype: mx.Dtype) -> mx.array:
    """A stored tensor as an MLX array: floats as `dtype`, packed integers as they are.

    Convolutions turn from (O, I, kh, kw) to MLX's (O, kh, kw, I).
    """
    return in_layout(from_stored(_decoding_to(tensor, dtype).read()), dtype)


def _decoding_to(tensor: Tensor, dtype: mx.Dtype) -> Tensor:
    """A packed tensor that rounds its float32 values once, to `dtype`; any other does not change."""
    return tensor.cast(_STORED[dtype]) if isinstance(tensor, PackedTensor) else tensor


def in_layout(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """A stored array as `to_mlx` gives it."""
    if array.ndim == 4:
        array = mx.contiguous(array.transpose(0, 2, 3, 1))
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def from_stored(stored: Array) -> mx.array:
    """An array as files hold it, bfloat16 included, as MLX's own."""
    if stored.dtype == BFLOAT16:
        return mx.array(np.ascontiguousarray(stored).view(np.uint16)).view(mx.bfloat16)
    return mx.array(stored)


def to_stored(array: mx.array) -> Array:
    """The way back from `from_stored`."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(BFLOAT16)
    return np.array(array)


def to_numpy(array: mx.array) -> Array:
    """A parameter as float32 in the layout of a checkpoint: the way back from `to_mlx`."""
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(array.astype(mx.float32))
