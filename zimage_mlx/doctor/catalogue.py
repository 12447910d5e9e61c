"""Every check: its sizes, how much work it is, and how many roundings its result goes through.

Roundings are counted along the longest way through the computation, on values of the size of the result:

- A product rounds its result. A convolution rounds its product, and the sum with its bias.
- A weight of 4 or 8 bits is unpacked as q scale + bias. Its product is twice as large as the sum, so it counts four
  times; the sum and the result of the product add one each.
- An RMS norm rounds the normed value and its product with the weight. A layer norm sums twice, for mean and variance.
- Attention rounds q (1), scores, softmax and result. An error of a score s is one of e^s, and the largest scores count
  the most: for normal ones E[s^2 e^2s] / E[e^2s] = 5.
- A block: attention (8). Queries and keys pass norm, modulation, product, norm and rotation (8 each). Values, output,
  its norm and gate (8). The feed-forward half is the same without attention (10). Both sums are rounded at the size of
  the stream, which is 1.9 times the size of the part that the block adds (2 x 3.5).
- Its gradient goes through all of that, and back through half as much again. A layer of the text encoder has no gates,
  and its stream is no larger than what it adds.
"""

from __future__ import annotations

from zimage_ref.doctor import work

from . import cases, layers
from .cases import FLOATS, Case, Size
from .layers import BlockTrial, encoder_config

_TF32 = "float32 products are rounded like TF32: set MLX_ENABLE_TF32=0; else update MLX"
_WINOGRAD = "do not train or generate with this MLX: its convolution loses digits; update MLX, or give `dtype` float32"
_PRODUCTS = [(1088, 3840, 3840), (1088, 1536, 1536), (320, 768, 768), (288, 384, 512)]
_PACKED = [(1088, 1536, 1536), (320, 768, 768), (64, 256, 128)]
_BLOCKS = [(32, 30), (16, 30), (16, 12), (8, 6), (8, 3)]  # rows of patches, heads
_BLOCK_ROUNDINGS, _GRADIENT_ROUNDINGS, _ENCODER_ROUNDINGS = 49, 74, 25


def _product_flops(size: Size) -> float:
    rows, inputs, outputs = size
    return 2.0 * rows * inputs * outputs


def _attention_flops(size: Size) -> float:
    tokens, heads = size
    return 4.0 * tokens**2 * heads * 128 + 100.0 * tokens**2 * heads  # and the softmax, which is slow in NumPy


def _convolution_flops(size: Size) -> float:
    side, inputs, outputs = size
    return 18.0 * side**2 * inputs * outputs


def _block_flops(size: Size) -> float:
    trial = BlockTrial(*size)
    return work.block(trial.config, trial.tokens, 2).flops


def _gradient_flops(size: Size) -> float:
    trial = BlockTrial(*size)
    forward = work.block(trial.config, trial.tokens, 2)
    return 1.3 * (forward.flops + work.block_backward(trial.config, trial.tokens, 2).flops)


def _block_sums(size: Size) -> int:
    trial = BlockTrial(*size)
    return 4 * trial.config.dim + trial.config.ffn_dim + trial.tokens


def _encoder_flops(size: Size) -> float:
    tokens, heads = size
    config = encoder_config(heads)
    hidden, ffn = config.hidden_size, config.intermediate_size
    return 2.0 * tokens * (hidden * 128 * 2 * (heads + heads // 4) + 3 * hidden * ffn)


def _encoder_sums(size: Size) -> int:
    config = encoder_config(size[1])
    return 2 * config.hidden_size + 128 * size[1] + config.intermediate_size + size[0]


def _quantized(bits: int, unpacked: bool, backward: bool) -> Case:
    ways = f"{bits} bits, {'unpacked' if unpacked else 'packed'}{', gradient' if backward else ''}"
    return Case(
        f"product of {ways}", _PRODUCTS if unpacked else _PACKED, _product_flops,
        cases.quantized_product(bits, backward, unpacked), 6, lambda size: size[2 if backward else 1],
        quick=("bf16",) if unpacked else (), sums_rounded_on_cpu=not unpacked,
    )  # fmt: skip


def catalogue(packed: bool) -> list[Case]:
    """All checks in the order they run. packed: also MLX's kernels for many rows of packed weights.

    On CUDA those kernels are built when they are first used, which takes minutes, and nothing uses them.
    """
    quantized = [
        _quantized(bits, unpacked, backward)
        for bits in (8, 4) for unpacked in ((True, False) if packed else (True,)) for backward in (False, True)
    ]  # fmt: skip
    return [
        Case("product", [(1024, 2048, 2048), (512, 1024, 1024), (256, 512, 512)], _product_flops, cases.product, 1,
             lambda size: size[1], quick=FLOATS, remedy=_TF32),
        *quantized,
        Case("norms", [(1088, 3840), (320, 768), (128, 384)], lambda size: 60.0 * size[0] * size[1], cases.norms, 2,
             lambda size: 2 * size[1]),
        Case("rotation", [(1088, 30, 128), (320, 6, 128), (288, 3, 128)],
             lambda size: 300.0 * size[0] * size[1] * size[2], cases.rotation, 1, lambda size: 8),
        Case("attention", [(1088, 30), (1088, 8), (320, 2)], _attention_flops, cases.attended(False), 8,
             lambda size: size[0] + 128),
        Case("attention, masked", [(1088, 30), (1088, 8), (320, 2)], _attention_flops, cases.attended(True), 8,
             lambda size: size[0] + 128),
        Case("attention, causal", [(512, 32), (256, 8), (96, 4)], _attention_flops, cases.causal, 8,
             lambda size: size[0] + 128),
        Case("attention, long", [(4160, 8), (4160, 2), (2368, 1), (1088, 1), (320, 1)], _attention_flops,
             cases.attended(False), 8, lambda size: size[0] + 128),
        *(
            Case(f"convolution {a} to {b}", [(side, a, b) for side in (*larger, 64)] + [(64, 128, 128), (16, 128, 128)],
                 _convolution_flops, cases.convolution, 2, lambda size: 9 * size[1], remedy=_WINOGRAD)
            for a, b, larger in ((128, 128, (256, 128)), (256, 128, (128,)), (256, 256, (128,)), (512, 512, ()))
        ),
        Case("layer of the text encoder", [(512, 32), (64, 32), (64, 16), (64, 8)], _encoder_flops,
             layers.encoder_layer, _ENCODER_ROUNDINGS, _encoder_sums),
        Case("block", _BLOCKS, _block_flops, layers.block, _BLOCK_ROUNDINGS, _block_sums, quick=("bf16", "f32")),
        Case("gradient of a block", _BLOCKS, _gradient_flops, layers.gradient, _GRADIENT_ROUNDINGS,
             lambda size: 2 * _block_sums(size), quick=("bf16", "f32")),
    ]  # fmt: skip
