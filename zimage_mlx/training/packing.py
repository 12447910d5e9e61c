"""The matrices of a LoRA laid end to end, one vector for each sort: for a plain LoRA, all A and all B.

A step of the optimizer, a norm or an average is then a few operations on two long arrays instead of hundreds of
operations on short ones. The matrices are views of the vectors.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import mlx.core as mx

from zimage_mlx.networks.parameters import Parameters
from zimage_ref.lora.trained import MAGNITUDE

Vectors = dict[str, mx.array]  # a name such as lora_A -> (elements,)


class Packing:
    """Where in the vectors each matrix lies."""

    def __init__(self, parameters: Parameters) -> None:
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for factor in sorted({_factor(name) for name in parameters}):
            self.shapes[factor] = {name: p.shape for name, p in parameters.items() if _factor(name) == factor}

    def pack(self, parameters: Parameters) -> Vectors:
        """The vectors, in float32, of all matrices by name."""
        return {
            factor: mx.concatenate([parameters[name].flatten() for name in shapes]).astype(mx.float32)
            for factor, shapes in self.shapes.items()
        }

    def unpack(self, vectors: Vectors, dtype: mx.Dtype = mx.float32) -> Parameters:
        """The matrices by name, in `dtype`. Magnitudes stay float32: in 16 bits most of their steps would be lost."""
        parameters: Parameters = {}
        for factor, shapes in self.shapes.items():
            ends = list(accumulate(map(prod, shapes.values())))[:-1]
            parts = mx.split(vectors[factor].astype(mx.float32 if factor == MAGNITUDE else dtype), ends)
            parameters |= {n: part.reshape(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        return parameters


def _factor(name: str) -> str:
    return name.rpartition(".")[2]
