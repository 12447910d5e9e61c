"""The matrices of a LoRA laid end to end: one vector of every A, one of every B.

A step of the optimizer, a norm or an average is then a few operations on two long arrays rather than on hundreds of
short ones. The matrices are views of the vectors.
"""

from __future__ import annotations

from math import prod

import mlx.core as mx

from .loss import Parameters

Vectors = dict[str, mx.array]  # "lora_A" and "lora_B" -> (elements,)
FACTORS = ("lora_A", "lora_B")


class Packing:
    """Where each matrix lies."""

    def __init__(self, parameters: Parameters) -> None:
        self.shapes = {f: {n: p.shape for n, p in parameters.items() if n.endswith(f)} for f in FACTORS}

    def pack(self, parameters: Parameters) -> Vectors:
        """The matrices, all that there are, in float32."""
        return {
            factor: mx.concatenate([parameters[name].flatten() for name in shapes]).astype(mx.float32)
            for factor, shapes in self.shapes.items()
        }

    def unpack(self, vectors: Vectors, dtype: mx.Dtype = mx.float32) -> Parameters:
        """The matrices by name, in `dtype`."""
        parameters = {}
        for factor, shapes in self.shapes.items():
            vector, start = vectors[factor].astype(dtype), 0
            for name, shape in shapes.items():
                parameters[name] = vector[start : start + prod(shape)].reshape(shape)
                start += prod(shape)
        return parameters
