"""How fast the device is: products, attention, convolutions, memory; at sizes that the time allows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from zimage_mlx import device
from zimage_mlx.networks.convolution import Source, convolve
from zimage_mlx.networks.ops import attention
from zimage_mlx.networks.quantized import QuantizedLinear
from zimage_ref.doctor.findings import Progress, Rate
from zimage_ref.doctor.prediction import Rates
from zimage_ref.formats.quantize import GROUP_SIZE

from .cases import Convolution
from .checking import Pace
from .numbers import DTYPES, Numbers, filled

_ROWS, _WIDTH, _FFN = 1088, 3840, 10240  # the largest product of a block, for a picture of 512 x 512
_ATTENTION = 1088, 30
_CONVOLUTIONS = {128: 256, 256: 128, 512: 64}  # channels and side: the same number of operations each
PACKED = "packed product"
_MEMORY = 1 << 26  # float32 values that are read and written


def median(run: Callable[[], object], seconds: float, most: int = 7) -> float:
    """The median time of several runs after one that does not count, of as many as fit into `seconds`; one at least."""
    run()
    times: list[float] = []
    while not times or (len(times) < most and sum(times) + times[-1] < seconds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class Measuring:
    """Measures rates within a share of time for each."""

    pace: Pace
    compute: str  # the dtype that quantized weights are computed in
    share: float  # seconds

    def _fitting(self, flops: float, dtype: str) -> float:
        """The part of `flops` that fits into the share, at most 1: twice, since the first run does not count."""
        return min(1.0, self.share * self.pace.device[dtype] / (3 * flops))

    def product(self, precision: str, packed: bool = False) -> Rate:
        """x W^T of the feed-forward, W of `precision`. packed: by MLX's kernel for quantized weights."""
        dtype = self.compute if precision in ("8", "4") else precision
        part = self._fitting(2.0 * _ROWS * _WIDTH * _FFN, dtype)
        rows, outputs = max(256, int(_ROWS * part**0.5)), max(256, int(_FFN * part**0.5) // 64 * 64)
        x = mx.random.normal((rows, _WIDTH)).astype(DTYPES[dtype])
        weight = mx.random.normal((outputs, _WIDTH)).astype(DTYPES[dtype])
        if precision in ("8", "4"):
            bits = int(precision)
            layer = QuantizedLinear(_WIDTH, outputs, bias=False, group_size=GROUP_SIZE, bits=bits)
            parts = mx.quantize(weight, group_size=GROUP_SIZE, bits=bits)
            layer.update(dict(zip(("weight", "scales", "biases"), parts, strict=True)))
            if packed:
                layer.keep_packed()
            mx.eval(x, layer.parameters())
            seconds = median(lambda: mx.eval(layer(x)), self.share)
        else:
            mx.eval(x, weight)
            seconds = median(lambda: mx.eval(x @ weight.T), self.share)
        size, flops = f"{rows} x {_WIDTH} x {outputs}", 2 * rows * _WIDTH * outputs
        return self._rate(PACKED if packed else "product", precision, size, flops / seconds)

    def attention(self, dtype: str) -> Rate:
        """Of a picture of 512 x 512 and its caption."""
        tokens, heads = _ATTENTION
        heads = max(1, int(heads * self._fitting(8.0 * tokens**2 * heads * 128, dtype)))
        q, k, v = (mx.random.normal((1, heads, tokens, 128)).astype(DTYPES[dtype]) for _ in range(3))
        mx.eval(q, k, v)
        seconds = median(lambda: mx.eval(attention(q, k, v)), self.share)
        return self._rate("attention", dtype, f"{tokens} x {heads}", 4 * tokens**2 * heads * 128 / seconds)

    def convolution(self, dtype: str) -> Rate:
        """3x3, as wide as in the autoencoder, which does about a third of its work in each of the widths.

        For the same number of operations, 128 channels take twice as long as 512 on a CPU.
        """
        whole = 18.0 * sum((channels * side) ** 2 for channels, side in _CONVOLUTIONS.items())
        part, flops, seconds = math.sqrt(self._fitting(whole, dtype)), 0.0, 0.0
        for channels, whole_side in _CONVOLUTIONS.items():
            side = max(16, int(whole_side * part))
            flops += 18 * (side * channels) ** 2
            seconds += self._convolution(channels, side, dtype)
        size = f"{min(_CONVOLUTIONS)} to {max(_CONVOLUTIONS)} channels"
        return self._rate("convolution", dtype, size, flops / seconds)

    def _convolution(self, channels: int, side: int, dtype: str) -> float:
        shapes = {"conv.weight": (channels, channels, 3, 3), "conv.bias": (channels,)}
        module = filled(Convolution(channels, channels), Numbers.seeded(0).weights(shapes), dtype)
        x = mx.random.normal((1, side, side, channels)).astype(DTYPES[dtype])
        mx.eval(x)
        share = self.share / len(_CONVOLUTIONS)
        return median(lambda: mx.eval(convolve(module.conv, Source(x), None)), share)

    def memory(self) -> Rate:
        """Bytes read and written by one elementwise operation."""
        x = mx.ones(_MEMORY)
        mx.eval(x)
        seconds = median(lambda: mx.eval(x + 1.0), self.share)
        return Rate("memory", "f32", f"{4 * _MEMORY / 1e6:.0f} MB", 8 * _MEMORY / seconds, "byte")

    def _rate(self, name: str, precision: str, size: str, per_second: float) -> Rate:
        return Rate(name, precision, size, per_second, "FLOP")

    def all(self, precisions: list[str], progress: Progress) -> Iterator[Rate]:
        """Every rate that a prediction for `precisions` needs."""
        dtypes = [p for p in precisions if p in DTYPES]
        work: list[tuple[str, Callable[[], Rate]]] = [("memory", self.memory)]
        emulated = ["f16"] if self.compute == "bf16" else []  # for the advice to a chip that emulates bfloat16
        work += [(f"product, {p}", partial(self.product, p)) for p in dict.fromkeys([*precisions, *emulated])]
        if device.on_metal():  # only there the program may choose
            bits = [p for p in precisions if p not in DTYPES]
            work += [(f"{PACKED}, {p}", partial(self.product, p, packed=True)) for p in bits]
        work += [(f"attention, {d}", partial(self.attention, d)) for d in dtypes]
        work += [(f"convolution, {d}", partial(self.convolution, d)) for d in dtypes]
        for i, (name, run) in enumerate(work):
            progress("rates", i, len(work), name)
            yield run()
            mx.clear_cache()
        progress("rates", len(work), len(work), "")


def packed_shares(rates: list[Rate]) -> dict[str, float]:
    """By bits: the speed of the packed product over that of the unpacked one."""
    found = {(rate.name, rate.dtype): rate.per_second for rate in rates}
    return {bits: speed / found["product", bits] for (name, bits), speed in found.items() if name == PACKED}


def by_precision(rates: list[Rate], precisions: list[str], compute: str) -> dict[str, Rates]:
    """The rates that the model of time takes; what is not of a precision's own is that of its compute dtype."""
    found = {(rate.name, rate.dtype): rate.per_second for rate in rates}

    def of(name: str, precision: str) -> float:
        return found.get((name, precision)) or found[name, compute]

    return {
        p: Rates(of("product", p), of("attention", p), of("convolution", p), found["memory", "f32"]) for p in precisions
    }
