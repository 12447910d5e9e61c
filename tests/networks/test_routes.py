"""Every primitive of every network at the official sizes, held against Metal's rules; see `support.metal_routes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from support.macs import pretend
from support.networks import HAS_MLX

if not HAS_MLX:
    pytest.skip("mlx is not installed", allow_module_level=True)

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from support.metal_routes import PRODUCTS, Graph, trace

from zimage_mlx.lora.layers import add_trainable_loras
from zimage_mlx.networks import ops
from zimage_mlx.networks.convolution import Conv3x3
from zimage_mlx.networks.quantized import QuantizedLinear
from zimage_mlx.networks.strips import Strips
from zimage_mlx.networks.text_encoder import TextEncoder
from zimage_mlx.networks.transformer import Transformer
from zimage_mlx.networks.tree import find
from zimage_mlx.networks.tree import replace as put
from zimage_mlx.networks.vae import VAE
from zimage_mlx.training.gradient import LossAndGradients
from zimage_mlx.training.loss import NoisyBatch
from zimage_ref.doctor import work
from zimage_ref.doctor.work import Tokens, Work
from zimage_ref.memory import FAST, LEAN
from zimage_ref.model.config import OFFICIAL_TEXT_ENCODER, OFFICIAL_TRANSFORMER, OFFICIAL_VAE
from zimage_ref.model.parameters import LORA_TARGETS
from zimage_ref.model.tokenizer import MAX_TOKENS

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32, "8": mx.bfloat16, "4": mx.bfloat16}
ONE_BLOCK = replace(OFFICIAL_TRANSFORMER, n_layers=1, n_refiner_layers=1)  # the others are the same
LAYERS = [name for names in LORA_TARGETS.values() for name in names]
FORWARD = [("bf16", 1024, 1), ("f16", 512, 1), ("f32", 256, 4), ("8", 1024, 1), ("4", 1536, 2), ("bf16", 2048, 2)]
ALL = [(p, side, batch) for p in DTYPES for side in (256, 512, 1024, 1536, 2048) for batch in (1, 2, 4)]
REST = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FORWARD]


def emptied(module: Any, dtype: mx.Dtype) -> Any:
    """`module` with weights that are never computed. No two are equal: MLX makes equal products only once."""
    numbers = count(1)
    module.update(tree_map(lambda p: mx.full(p.shape, next(numbers), dtype), module.parameters()))
    for each in module.modules():
        if isinstance(each, Conv3x3):
            each.mirror()
    return module


def transformer(precision: str, trains: bool = False, packed: bool = False) -> Transformer:
    model = emptied(Transformer(ONE_BLOCK), DTYPES[precision])
    for block in (*model.layers, *model.noise_refiner, *model.context_refiner):
        if precision in ("8", "4"):
            for name in LAYERS:
                put(block, [(name, quantized(find(block, name), int(precision), packed))])
        if trains:
            add_trainable_loras(block, LAYERS, 16, 16.0, np.random.default_rng(0))
    return model


def quantized(layer: nn.Linear, bits: int, packed: bool) -> QuantizedLinear:
    outputs, inputs = layer.weight.shape
    made = QuantizedLinear(64, 64, bias=False, group_size=64, bits=bits)
    made.weight = mx.zeros((outputs, inputs * bits // 32), mx.uint32)
    made.scales = made.biases = mx.zeros((outputs, inputs // 64), layer.weight.dtype)
    if packed:
        made.keep_packed()
    made.freeze()
    return made


def denoising(precision: str, side: int, batch: int, packed: bool = False) -> Callable[[], Any]:
    model, latents = transformer(precision, packed=packed), mx.zeros((batch, 16, side // 8, side // 8))
    return lambda: model(latents, mx.zeros((1,)), captions(batch))


def captions(batch: int) -> list[mx.array]:
    """Of several lengths, so that the shorter ones are masked."""
    return [mx.zeros((60 + 40 * i, OFFICIAL_TRANSFORMER.cap_feat_dim)) for i in range(batch)]


def step(precision: str, side: int, batch: int, budget: float) -> Callable[[], Any]:
    model, latents = transformer(precision, trains=True), mx.zeros((batch, 16, side // 8, side // 8))
    noisy = NoisyBatch(latents, latents, mx.zeros((batch,)), captions(batch))
    return lambda: LossAndGradients(model, budget, compiled=False)(noisy)


def check(graph: Graph, *expected: str) -> None:
    """No rule is broken, and the operations that a network cannot do without were met."""
    assert not graph.faults, "\n".join(graph.faults[:5])
    assert not [name for name in expected if not graph.met[name]], graph.met


@pytest.mark.parametrize(("precision", "side", "batch"), [*FORWARD, *REST])
def test_a_forward_pass(precision: str, side: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    graph = trace(denoising(precision, side, batch), monkeypatch)
    check(graph, "Matmul", "attention", "norm", *(["dequantize"] if precision in ("8", "4") else []))
    if precision in ("8", "4"):
        check(trace(denoising(precision, side, batch, packed=True), monkeypatch), "QuantizedMatmul", "attention")


@pytest.mark.parametrize("budget", [0.0, 1e30])
@pytest.mark.parametrize(("precision", "side", "batch"), [("bf16", 1024, 1), ("8", 512, 2), ("bf16", 2048, 4), *(
    pytest.param(p, side, batch, marks=pytest.mark.slow)
    for p in ("bf16", "f32", "8", "4") for side in (256, 512, 1024, 2048) for batch in (1, 4)
    if (p, side, batch) not in (("bf16", 1024, 1), ("bf16", 2048, 4))
)])  # fmt: skip
def test_the_gradient_of_loras(
    precision: str, side: int, batch: int, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    check(
        trace(step(precision, side, batch, budget), monkeypatch, gradients=True),
        "Matmul",
        "attention",
        "norm",
        "Softmax",
    )


@pytest.mark.parametrize("precision", ["bf16", "f32"])
@pytest.mark.parametrize("tokens", [1, 64, MAX_TOKENS])
def test_the_text_encoder(precision: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    model = emptied(TextEncoder(replace(OFFICIAL_TEXT_ENCODER, num_hidden_layers=2)), DTYPES[precision])
    check(trace(lambda: model(mx.zeros((tokens,), mx.int32)), monkeypatch), "Matmul", "attention", "norm", "rope")


@pytest.mark.parametrize("footprint", [LEAN, FAST], ids=["lean", "fast"])
@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize(("precision", "side"), [("bf16", 512), *(
    pytest.param(p, side, marks=pytest.mark.slow) for p in ("bf16", "f32") for side in (256, 1024, 2048)
)])  # fmt: skip
def test_the_autoencoder(precision: str, side: int, way: str, footprint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    model = emptied(VAE(OFFICIAL_VAE), DTYPES[precision])
    given = mx.zeros((1, 3, side, side) if way == "encode" else (1, 16, side // 8, side // 8))
    check(trace(lambda: getattr(model, way)(given, Strips(footprint.strips)), monkeypatch), "Convolution", "attention")


def counted(function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Work:
    """The operations of a traced function, by kind."""
    flops = trace(function, monkeypatch).flops
    return Work(sum(flops[name] for name in PRODUCTS), flops["attention"], flops["Convolution"])


@pytest.mark.parametrize("side", [256, 1024])
def test_the_model_of_time_counts_what_is_traced(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that it leaves out are small: refined captions, embedders, rotation by a matrix."""
    found = counted(denoising("bf16", side, 1), monkeypatch)
    said = work.forward(ONE_BLOCK, Tokens.of(side), 2)
    refined = work.block(ONE_BLOCK, captions(1)[0].shape[0], 2)
    assert found.products == pytest.approx(said.products + refined.products, rel=0.02)
    assert found.attention == pytest.approx(said.attention + refined.attention, rel=0.02)

    encoder = replace(OFFICIAL_TEXT_ENCODER, num_hidden_layers=2)
    text = emptied(TextEncoder(encoder), mx.bfloat16)
    found = counted(lambda: text(mx.zeros((64,), mx.int32)), monkeypatch)
    assert found.products == work.encode_text(encoder, 64, 2).products

    autoencoder, strips = emptied(VAE(OFFICIAL_VAE), mx.bfloat16), Strips(LEAN.strips)
    for way, given, said in (
        (autoencoder.decode, mx.zeros((1, 16, side // 8, side // 8)), work.decode(OFFICIAL_VAE, side**2, 2)),
        (autoencoder.encode, mx.zeros((1, 3, side, side)), work.encode(OFFICIAL_VAE, side**2, 2)),
    ):
        found = counted(lambda way=way, given=given: way(given, strips), monkeypatch)
        assert found.convolutions == said.convolutions
        assert found.products + found.attention == pytest.approx(said.products, rel=0.05)


def test_what_breaks_a_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine as it is, nothing is divided for Metal; and some faults are planted."""
    long = trace(denoising("bf16", 2048, 2), monkeypatch)
    assert {fault.split()[0] for fault in long.faults} == {"Matmul", "attention"} and long.longest > 8e12
    wide, picture = mx.zeros((1, 1, 9000, 96)), mx.zeros((1, 64, 64, 128))
    for function, words in (
        (lambda: mx.linalg.inv(mx.zeros((3, 3)), stream=mx.cpu), "nobody has read"),
        (lambda: mx.zeros((1 << 16, 1 << 16)) + 1, "too large"),
        (lambda: mx.conv2d(picture, mx.zeros((128, 3, 3, 128)), padding=1), "Winograd"),
        (lambda: mx.zeros((3,)).astype(mx.float64), "float64"),
        (lambda: mx.fast.scaled_dot_product_attention(wide, wide, wide, scale=1.0) + 0, ""),
        (lambda: mx.fast.scaled_dot_product_attention(*3 * [mx.zeros((1, 9, 9000, 96))], scale=1.0), "not fused"),
    ):
        faults = trace(function, monkeypatch).faults
        assert any(words in fault for fault in faults) if words else not faults, (words, faults)


def test_products_in_rows_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(24, 40), mx.random.normal((2, 50, 24), key=mx.random.key(0))
    outputs, d = mx.vjp(lambda x: [ops.in_rows(layer, x, 40)], [x], [mx.ones((2, 50, 40))])
    pretend(monkeypatch)
    monkeypatch.setattr(ops, "_LONGEST_KERNEL", 2 * 2 * 13 * 24 * 40)
    called = []
    watched = lambda x: called.append(x.shape) or layer(x)  # noqa: E731
    in_rows, d_in_rows = mx.vjp(lambda x: [ops.in_rows(watched, x, 40)], [x], [mx.ones((2, 50, 40))])
    assert called == 3 * [(2, 13, 24)] + [(2, 11, 24)]
    for ours, theirs in zip((*in_rows, *d_in_rows), (*outputs, *d), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-5, atol=1e-6)
