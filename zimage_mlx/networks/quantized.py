"""Linear layers of 4 or 8 bits, fast for one row and for thousands."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

# MLX's quantized product is made for generating text, a row at a time. Measured on CUDA with 1088 rows, unpacking the
# weight and multiplying in bfloat16 took 35 ms a forward pass where the quantized product took 90. Its kernels for
# several rows are built there when they are first used, which took a minute and a half each: only single rows use it
_UNPACK_FROM_ROWS = 2 if mx.cuda.is_available() else 256


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's layer, which unpacks its weight for the time of one product if many rows share it.

    On Metal this is a choice: MLX's product takes many rows there, and unpacked weights take memory. See `load`.
    """

    _unpack = True  # a name that begins so is no parameter

    def keep_packed(self) -> None:
        """Leaves the weight packed from here on, however many rows there are."""
        self._unpack = False

    def __call__(self, x: mx.array) -> mx.array:
        if not self._unpack or x.size // x.shape[-1] < _UNPACK_FROM_ROWS:
            product: mx.array = super().__call__(x)
            return product
        weight = mx.dequantize(self.weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits)
        y = x @ weight.T
        return y + self.bias if "bias" in self else y
