"""Layers that train an update beside a frozen Linear layer, quantized or not: one class for each kind.

    LoRA    y = W x + s B (A x)
    LoKr    y = W x + s (W1 (x) W2) x, as two small products
    LoHa    y = W x + s ((A1 B1) * (A2 B2)) x
    DoRA    y = m / ||W + s B A|| (W x + s B (A x)); the norm of each row

`zimage_ref.lora.trained` gives the matrices, their first values and their sources.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zimage_ref.lora.trained import MAGNITUDE, TRAINED, Factors
from zimage_ref.lora.updates import Update

_Triple = tuple[mx.array, mx.array, mx.array]


class Trainable(nn.Module):
    """A frozen base with an update beside it. The matrices may be float32 while the base is bfloat16."""

    kind: str  # in TRAINED

    def __init__(self, base: nn.Module, factors: Factors, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self._scale = scale
        self._names = tuple(factors)
        for name, array in factors.items():
            self[name] = mx.array(array)

    def factor(self, name: str, like: mx.array) -> mx.array:
        """A matrix in the dtype of `like`, so that a result keeps the dtype of the stream."""
        return cast(mx.array, self[name].astype(like.dtype))

    def factors(self) -> Factors:
        """The matrices as they are now, in float32."""
        return {name: np.array(self[name].astype(mx.float32)) for name in self._names}

    def learned(self) -> Update:
        """The update that the layer makes."""
        return TRAINED[self.kind].update(self.factors(), self._scale)


class LoRALinear(Trainable):
    """A branch of low rank."""

    kind = "lora"

    def __call__(self, x: mx.array) -> mx.array:
        A, B = self.factor("lora_A", x), self.factor("lora_B", x)

        def branched(x: mx.array, A: mx.array, B: mx.array) -> mx.array:
            return mx.addmm(self.base(x), x @ A.T, B.T, self._scale)

        def gradient(primals: _Triple, d: mx.array, _: mx.array) -> _Triple:
            """The gradient of the branch; the base is frozen. Adding in place saves passes over the wide arrays."""
            x, A, B = primals
            (dx,) = mx.vjp(lambda x: [self.base(x)], [x], [d])[1]
            inner, hidden = d @ B, x @ A.T  # (..., rank)
            if self._scale != 1:
                inner, hidden = inner * self._scale, hidden * self._scale
            d_A = inner.flatten(0, -2).T @ x.flatten(0, -2)
            d_B = d.flatten(0, -2).T @ hidden.flatten(0, -2)
            return mx.addmm(dx, inner, A), d_A, d_B

        function = mx.custom_function(branched)
        function.vjp(gradient)
        return cast(mx.array, function(x, A, B))


class LoKrLinear(Trainable):
    """A Kronecker product. x is laid out as a matrix, so that the large product is never made."""

    kind = "lokr"

    def __call__(self, x: mx.array) -> mx.array:
        W1, W2 = self._matrix("lokr_w1", x), self._matrix("lokr_w2", x)
        grid = x.reshape(*x.shape[:-1], W1.shape[1], W2.shape[1])  # (..., in1, in2)
        # the scale goes to the smallest array
        made = (W1 * self._scale if self._scale != 1 else W1) @ (grid @ W2.T)  # (..., out1, out2)
        return cast(mx.array, self.base(x) + made.flatten(-2))

    def _matrix(self, name: str, like: mx.array) -> mx.array:
        if name in self:
            return self.factor(name, like)
        return self.factor(f"{name}_a", like) @ self.factor(f"{name}_b", like)


class LoHaLinear(Trainable):
    """An elementwise product of two low-rank matrices. It has the size of the weight, and lives for one product."""

    kind = "loha"

    def __call__(self, x: mx.array) -> mx.array:
        A1, B1, A2, B2 = (self.factor(name, x) for name in self._names)
        if self._scale != 1:
            A1 = A1 * self._scale
        return cast(mx.array, self.base(x) + x @ ((A1 @ B1) * (A2 @ B2)).T)


class DoRALinear(Trainable):
    """A low-rank branch, then a length for each row of the weight, in float32. The gradient goes through the norm."""

    kind = "dora"

    def __init__(self, base: nn.Module, factors: Factors, scale: float = 1.0) -> None:
        super().__init__(base, factors, scale)
        if MAGNITUDE not in factors:  # the lengths that the rows have
            self._names = (*self._names, MAGNITUDE)
            self[MAGNITUDE] = self._lengths()

    def __call__(self, x: mx.array) -> mx.array:
        A, B = self.factor("lora_A", x), self.factor("lora_B", x)
        bias = self.base.get("bias")
        product = self.base(x) if bias is None else self.base(x) - bias
        y = mx.addmm(product, x @ A.T, B.T, self._scale)
        y = (y * (self[MAGNITUDE].astype(mx.float32) / self._lengths())).astype(x.dtype)  # float32 in between
        return cast(mx.array, y if bias is None else y + bias)

    def _lengths(self) -> mx.array:
        """The length of each row of W + s B A, (out,) float32. B A is not made: it has the size of the weight."""
        W = mx.stop_gradient(dense_weight(self.base))
        A, B = self["lora_A"].astype(mx.float32), self["lora_B"].astype(mx.float32) * self._scale
        squares = mx.sum(mx.square(W.astype(mx.float32)), axis=1)
        crossed = mx.sum((W @ A.T.astype(W.dtype)).astype(mx.float32) * B, axis=1)
        own = mx.sum((B @ (A @ A.T)) * B, axis=1)
        return mx.sqrt(mx.maximum(squares + 2 * crossed + own, 1e-30))


def dense_weight(layer: nn.Module) -> mx.array:
    """The weight (out, in) of a Linear layer: of a quantized one, of one with a branch."""
    if isinstance(layer, LoRALinear):
        branch: mx.array = layer.lora_B @ layer.lora_A * layer._scale
        return dense_weight(layer.base) + branch
    if isinstance(layer, nn.QuantizedLinear):
        biases = layer.get("biases")
        weight: mx.array = mx.dequantize(layer.weight, layer.scales, biases, layer.group_size, layer.bits, layer.mode)
        return weight
    return cast(mx.array, layer.weight)


LAYERS: dict[str, type[Trainable]] = {layer.kind: layer for layer in (LoRALinear, LoKrLinear, LoHaLinear, DoRALinear)}
