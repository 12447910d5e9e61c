"""Weights from disk into MLX modules: one tensor at a time, in the layout and precision that MLX wants."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from zimage_ref.errors import WeightError, listing
from zimage_ref.quantize import Quantization, QuantizedTensor
from zimage_ref.tensors import BFLOAT16, Array, Tensor, Tensors

from .quantized import QuantizedLinear

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load(model: nn.Module, tensors: Tensors, dtype: mx.Dtype, quantization: Quantization | None = None) -> None:
    """Fills every parameter of `model` from `tensors`, which must hold exactly these.

    Linear layers that are stored quantized, or that `quantization` covers, become quantized ones. Raises
    WeightError where names or shapes differ. Only one tensor is in flight: loading never holds two copies of a model.
    """
    expected = dict(tree_flatten(model.parameters()))
    if expected.keys() != tensors.keys():
        raise WeightError(f"weights differ from the model in {listing(sorted(expected.keys() ^ tensors.keys()))}")
    loaded, layers = [], []
    for name, tensor in tensors.items():
        how = _quantization(name, tensor, quantization)
        if how:
            layers.append((name.removesuffix(".weight"), _quantized_linear(tensor, dtype, how)))
            continue
        array = to_mlx(tensor, dtype)
        if array.shape != expected[name].shape:
            raise WeightError(f"{name} has shape {array.shape}, the model needs {expected[name].shape}")
        mx.eval(array)
        loaded.append((name, array))
    model.update_modules(tree_unflatten(layers))
    model.update(tree_unflatten(loaded))


def _quantization(name: str, tensor: Tensor, asked: Quantization | None) -> Quantization | None:
    if isinstance(tensor, QuantizedTensor):
        return tensor.quantization
    return asked if asked and asked.covers(name, tensor.shape) else None


def _quantized_linear(tensor: Tensor, dtype: mx.Dtype, how: Quantization) -> QuantizedLinear:
    outputs, inputs = tensor.shape
    layer = QuantizedLinear(inputs, outputs, bias=False, group_size=how.group_size, bits=how.bits)
    if isinstance(tensor, QuantizedTensor):
        parts = {name: to_mlx(part, dtype) for name, part in tensor.parts.items()}
    else:
        arrays = mx.quantize(to_mlx(tensor, dtype), group_size=how.group_size, bits=how.bits)
        parts = dict(zip(("weight", "scales", "biases"), arrays, strict=True))
    mx.eval(parts)
    layer.update(parts)
    return layer


def to_mlx(tensor: Tensor, dtype: mx.Dtype) -> mx.array:
    """A stored tensor as an MLX array: floats as `dtype`, packed integers as they are.

    Convolutions turn from (O, I, kh, kw) to MLX's (O, kh, kw, I).
    """
    array = from_stored(tensor.read())
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
