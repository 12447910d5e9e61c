"""The matrices of a LoRA laid end to end: one vector of every A, one of every B.

A step of the optimizer, a norm or an average is then a few operations on two long arrays instead of hundreds of
operations on short ones. The matrices are views of the vectors.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import mlx.core as mx

from zimage_mlx.networks.parameters import Parameters

Vectors = dict[str, mx.array]  # "lora_A" and "lora_B" -> (elements,)
FACTORS = ("lora_A", "lora_B")


class Packing:
    """Where in the vectors each matrix lies."""

    def __init__(self, parameters: Parameters) -> None:
        self.shapes = {f: {n: p.shape for n, p in parameters.items() if n.endswith(f)} for f in FACTORS}

    def pack(self, parameters: Parameters) -> Vectors:
        """The vectors, in float32, of all matrices by name."""
        return {
            factor: mx.concatenate([parameters[name].flatten() for name in shapes]).astype(mx.float32)
            for factor, shapes in self.shapes.items()
        }

    def unpack(self, vectors: Vectors, dtype: mx.Dtype = mx.float32) -> Parameters:
        """The matrices by name, in `dtype`."""
        parameters: Parameters = {}
        for factor, shapes in self.shapes.items():
            ends = list(accumulate(map(prod, shapes.values())))[:-1]
            parts = mx.split(vectors[factor].astype(dtype), ends)
            parameters |= {n: part.reshape(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        return parameters
