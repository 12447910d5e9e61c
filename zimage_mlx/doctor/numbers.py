"""Random numbers for checks: the same on every machine, and exact in bfloat16, so that inputs carry no error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zimage_mlx.networks.weights import load
from zimage_ref.formats.tensors import Array, Tensor
from zimage_ref.model.parameters import Shapes
from zimage_ref.networks.weights import Weights

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}
_POOL = 4_194_301  # a prime, so that rows of a matrix are not alike


@dataclass(frozen=True)
class Numbers:
    """A stream of random arrays."""

    rng: np.random.Generator

    @classmethod
    def seeded(cls, seed: int) -> Numbers:
        """The stream of `seed`."""
        return cls(np.random.default_rng(seed))

    def __call__(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Array:
        """Normal numbers (float32) of `shape`, cut off to bfloat16's bits; large arrays repeat a pool of them."""
        size = math.prod(shape)
        drawn = self.rng.standard_normal(min(size, _POOL), np.float32) * np.float32(scale) + np.float32(mean)
        exact = (drawn.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return np.resize(exact, shape)

    def weights(self, shapes: Shapes) -> dict[str, Array]:
        """Weights of a network: matrices that keep the size of what they multiply, norms around 1, small biases."""
        return {name: self._weight(name, shape) for name, shape in shapes.items()}

    def _weight(self, name: str, shape: tuple[int, ...]) -> Array:
        if len(shape) > 1:
            return self(*shape, scale=math.prod(shape[1:]) ** -0.5)
        return self(*shape, scale=0.1, mean=0.0 if name.endswith("bias") else 1.0)


def for_numpy(weights: Mapping[str, Array]) -> Weights:
    """Weights as networks of zimage_ref take them, in float32."""
    return Weights({name: Tensor.of(array) for name, array in weights.items()}, np.dtype(np.float32))


def filled(module: nn.Module, weights: Mapping[str, Array], dtype: str) -> nn.Module:
    """`module` with `weights`, in `dtype`, loaded as those of a checkpoint are."""
    load(module, {name: Tensor.of(array) for name, array in weights.items()}, DTYPES[dtype])
    return module


def on_device(array: Array, dtype: str) -> mx.array:
    """A float32 array as one of the device."""
    return mx.array(array).astype(DTYPES[dtype])
