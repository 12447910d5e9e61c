"""The class of a check, and the checks of single operations.

Every case says how many roundings to the dtype follow one another, and how long its longest sum is: its limit follows
(see `limits`). Sizes are in falling order, the first ones those of the real model; a slow device gets a smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zimage_mlx.networks.convolution import Conv3x3, Source, convolve
from zimage_mlx.networks.ops import attention, rms_norm, rotate, rotation_tables
from zimage_mlx.networks.quantized import QuantizedLinear
from zimage_mlx.networks.vae import GroupNorm
from zimage_ref.formats.quantize import GROUP_SIZE, Quantization, dequantized
from zimage_ref.formats.tensors import Array
from zimage_ref.model.config import OFFICIAL_VAE
from zimage_ref.networks import ops as reference
from zimage_ref.networks import transformer as reference_transformer
from zimage_ref.networks.vae import NORM_EPS

from .numbers import Numbers, filled, on_device

Size = tuple[int, ...]
FLOATS = ("bf16", "f16", "f32")


@dataclass(frozen=True)
class Trial:
    """One computation, prepared: what NumPy expects, and what the device makes in a dtype. Each may be called again."""

    expected: Callable[[], Sequence[Array]]
    actual: Callable[[str], Sequence[mx.array]]


@dataclass(frozen=True)
class Case:
    """A computation to check at one of several sizes."""

    name: str
    sizes: Sequence[Size]
    flops: Callable[[Size], float]
    prepare: Callable[[Size], Trial]
    roundings: int
    longest_sum: Callable[[Size], int]
    dtypes: Sequence[str] = FLOATS
    quick: Sequence[str] = ("bf16",)  # dtypes of a quick run; the others only in a full one
    sums_rounded_on_cpu: bool = False  # MLX's CPU kernel adds up in the dtype itself, not in float32
    remedy: str = "update MLX; if it stays wrong, report it with the JSON of this run"


def product(size: Size) -> Trial:
    """x (rows, inputs) by W (inputs, outputs)."""
    rows, inputs, outputs = size
    numbers = Numbers.seeded(1)
    x, w = numbers(rows, inputs), numbers(inputs, outputs)

    def actual(dtype: str) -> list[mx.array]:
        return [mx.matmul(on_device(x, dtype), on_device(w, dtype))]

    return Trial(lambda: [x @ w], actual)


def quantized_product(bits: int, backward: bool, unpacked: bool) -> Callable[[Size], Trial]:
    """x W^T, or d W, of a W of `bits` bits. unpacked: by the layer that trains and generates, else by MLX's kernel."""

    def prepare(size: Size) -> Trial:
        rows, inputs, outputs = size
        numbers = Numbers.seeded(2)
        packed = numbers.rng.integers(0, 2**32, (outputs, inputs * bits // 32), np.uint32)
        step = 2.0 / (2**bits - 1) * inputs**-0.5 * 1.7
        scales = numbers(outputs, inputs // GROUP_SIZE, scale=0.1 * step, mean=step)
        biases = numbers(outputs, inputs // GROUP_SIZE, scale=0.01 * step, mean=-step * (2**bits - 1) / 2)
        x = numbers(rows, outputs if backward else inputs)

        def expected() -> list[Array]:
            weight = dequantized(packed, scales, biases, Quantization(bits, GROUP_SIZE))
            return [x @ weight if backward else x @ weight.T]

        def actual(dtype: str) -> list[mx.array]:
            parts = mx.array(packed), on_device(scales, dtype), on_device(biases, dtype)
            given = on_device(x, dtype)
            if not unpacked:
                return [mx.quantized_matmul(given, *parts, transpose=not backward, group_size=GROUP_SIZE, bits=bits)]
            layer = QuantizedLinear(inputs, outputs, bias=False, group_size=GROUP_SIZE, bits=bits)
            layer.update(dict(zip(("weight", "scales", "biases"), parts, strict=True)))
            if not backward:
                return [layer(given)]
            return mx.vjp(lambda y: [layer(y)], [mx.zeros((rows, inputs), given.dtype)], [given])[1]

        return Trial(expected, actual)

    return prepare


def rotation(size: Size) -> Trial:
    """The rotary embedding of q (1, S, H, K) by the angles of positions up to 512."""
    tokens, heads, width = size
    numbers = Numbers.seeded(3)
    x = numbers(1, tokens, heads, width)
    frequencies = 256.0 ** -(np.arange(width // 2) / (width // 2))
    angles = np.outer(np.arange(tokens) % 512, frequencies).astype(np.float32)[None]  # (1, S, K / 2)

    def actual(dtype: str) -> list[mx.array]:
        return [rotate(on_device(x, dtype), rotation_tables(mx.array(angles)))]

    return Trial(lambda: [reference_transformer.rotate(x, np.exp(1j * angles))], actual)


def norms(size: Size) -> Trial:
    """RMS norm and layer norm of (tokens, width), group norm of the same as a picture."""
    tokens, width = size
    numbers = Numbers.seeded(4)
    x, weight, bias = numbers(1, tokens, width, mean=0.5), numbers(width, mean=1.0), numbers(width)
    picture = np.ascontiguousarray(x.reshape(1, -1, 32, width))  # (B, H, W, C)

    def expected() -> list[Array]:
        groups = OFFICIAL_VAE.norm_num_groups
        grouped = reference.group_norm(picture.transpose(0, 3, 1, 2), weight, bias, groups, NORM_EPS)
        return [
            reference.rms_norm(x, weight, 1e-5), reference.layer_norm(x, 1e-6), grouped.transpose(0, 2, 3, 1),
        ]  # fmt: skip

    def actual(dtype: str) -> list[mx.array]:
        given, norm = on_device(x, dtype), GroupNorm(width, OFFICIAL_VAE)
        norm.weight, norm.bias = on_device(weight, dtype), on_device(bias, dtype)
        return [
            rms_norm(given, norm.weight, 1e-5), mx.fast.layer_norm(given, None, None, 1e-6),
            norm(on_device(picture, dtype)),
        ]  # fmt: skip

    return Trial(expected, actual)


def attended(masked: bool) -> Callable[[Size], Trial]:
    """Attention of (1, H, S, 128), as in a block. masked: the last keys are left out."""

    def prepare(size: Size) -> Trial:
        tokens, heads = size
        numbers = Numbers.seeded(5)
        q, k, v = (numbers(1, heads, tokens, 128) for _ in range(3))
        mask = np.arange(tokens)[None, None, None] < tokens - tokens // 17 if masked else None

        def actual(dtype: str) -> list[mx.array]:
            queries, keys, values = (on_device(a, dtype) for a in (q, k, v))
            return [attention(queries, keys, values, None if mask is None else mx.array(mask))]

        return Trial(lambda: [reference.attention(q, k, v, mask)], actual)

    return prepare


def causal(size: Size) -> Trial:
    """Attention as in the text encoder: each token sees those before it, four heads share keys and values."""
    tokens, heads = size
    numbers = Numbers.seeded(6)
    q, k, v = numbers(1, heads, tokens, 128), numbers(1, heads // 4, tokens, 128), numbers(1, heads // 4, tokens, 128)

    def expected() -> list[Array]:
        keys, values = (np.repeat(a, 4, axis=1) for a in (k, v))
        return [reference.attention(q, keys, values, np.tri(tokens, dtype=bool)[None, None])]

    def actual(dtype: str) -> list[mx.array]:
        arrays = (on_device(a, dtype) for a in (q, k, v))
        return [mx.fast.scaled_dot_product_attention(*arrays, scale=128**-0.5, mask="causal")]

    return Trial(expected, actual)


class Convolution(nn.Module):
    """One of the autoencoder's convolutions, as a module to load weights into."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv3x3(inputs, outputs)


def convolution(size: Size) -> Trial:
    """A 3x3 convolution of (1, side, side, inputs), as the autoencoder runs it."""
    side, inputs, outputs = size
    numbers = Numbers.seeded(7)
    weights = numbers.weights({"conv.weight": (outputs, inputs, 3, 3), "conv.bias": (outputs,)})
    x = numbers(1, inputs, side, side)

    def expected() -> list[Array]:
        return [reference.conv2d(reference.pad_hw(x, 1, 1), weights["conv.weight"], weights["conv.bias"])]

    def actual(dtype: str) -> list[mx.array]:
        module = filled(Convolution(inputs, outputs), weights, dtype)
        given = on_device(x.transpose(0, 2, 3, 1), dtype)
        return [convolve(module.conv, Source(given), None).transpose(0, 3, 1, 2)]

    return Trial(expected, actual)
