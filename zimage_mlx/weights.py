"""Weights from disk into MLX modules: one tensor at a time, in the layout and precision that MLX wants."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from zimage_ref.errors import WeightError, listing
from zimage_ref.tensors import BFLOAT16, Array, Tensor, Tensors

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load(model: nn.Module, tensors: Tensors, dtype: mx.Dtype) -> None:
    """Fills every parameter of `model` from `tensors`, which must hold exactly these.

    Raises WeightError otherwise. Only one tensor is in flight: loading never holds two copies of a model.
    """
    expected = dict(tree_flatten(model.parameters()))
    if expected.keys() != tensors.keys():
        raise WeightError(f"weights differ from the model in {listing(sorted(expected.keys() ^ tensors.keys()))}")
    loaded = []
    for name, tensor in tensors.items():
        array = to_mlx(tensor, dtype)
        if array.shape != expected[name].shape:
            raise WeightError(f"{name} has shape {array.shape}, the model needs {expected[name].shape}")
        mx.eval(array)
        loaded.append((name, array))
    model.update(tree_unflatten(loaded))


def to_mlx(tensor: Tensor, dtype: mx.Dtype) -> mx.array:
    """A stored tensor as an MLX array of `dtype`; convolutions turn from (O, I, kh, kw) to MLX's (O, kh, kw, I)."""
    stored = tensor.read()
    if stored.dtype == BFLOAT16:
        array = mx.array(np.ascontiguousarray(stored).view(np.uint16)).view(mx.bfloat16)
    else:
        array = mx.array(stored)
    if array.ndim == 4:
        array = mx.contiguous(array.transpose(0, 2, 3, 1))
    return array.astype(dtype)


def to_numpy(array: mx.array) -> Array:
    """A parameter as float32 in the layout of a checkpoint: the way back from `to_mlx`."""
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(array.astype(mx.float32))
