"""float16: the range of the real model's values, which plain float16 cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.daily import daily
from support.networks import HAS_MLX, network

if not HAS_MLX:
    pytest.skip("mlx is not installed", allow_module_level=True)

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zimage_mlx import ZImagePipeline
from zimage_mlx.lora.layers import add_trainable_loras
from zimage_mlx.networks import half, running
from zimage_mlx.networks.transformer import Block, Transformer
from zimage_mlx.networks.vae import VAE
from zimage_mlx.training.block_gradient import BlockContext, backward, forward
from zimage_ref.checkpoints.hub import TINY
from zimage_ref.model import parameters

CONFIG = replace(tiny.TRANSFORMER, n_layers=2)
ATTENTION, PRODUCT, FEED_FORWARD = 1.4e5, 3e5, 1e6  # largest values of the real model: comments in mflux


def transformer(weights: dict[str, np.ndarray], dtype: str) -> Transformer:
    model = network("mlx", "transformer", CONFIG, weights, dtype)
    assert isinstance(model, Transformer)
    return model


def inputs() -> tuple[mx.array, mx.array, list[mx.array]]:
    x, caption = (
        mx.random.normal((1, 16, 12, 20), key=mx.random.key(0)),
        mx.random.normal((9, CONFIG.cap_feat_dim), key=mx.random.key(9)),
    )
    return x, mx.array([0.3]), [caption]


def ranges(model: Transformer) -> tuple[float, float, float]:
    """The largest values of attention's output, the product in the feed-forward, and its output, in any block."""
    found = np.zeros(3)

    def watch(block: Block, x: mx.array, *context: Any) -> mx.array:
        y, kept = forward(block, x, BlockContext(*context))
        gate, value = kept.feed_forward.hidden_gate, kept.feed_forward.hidden_value
        of_block = kept.attention.out, mx.sigmoid(gate) * gate * value, kept.feed_forward.out
        found[:] = np.maximum(found, [float(mx.abs(a).max().item()) for a in of_block])
        return y

    model.run = watch
    mx.eval(model(*inputs()))
    return tuple(found)


@pytest.fixture(scope="module")
def hot() -> dict[str, np.ndarray]:
    """Weights with which the blocks of a small transformer reach the real one's values."""
    weights = tiny.random_weights(parameters.transformer_parameters(CONFIG))
    attention, product, _ = ranges(transformer(weights, "float32"))
    for name in weights:
        if name.endswith("attention.to_out.0.weight"):
            weights[name] = weights[name] * np.float32(ATTENTION / attention)
        if name.endswith("feed_forward.w3.weight"):
            weights[name] = weights[name] * np.float32(PRODUCT / product)
    out = ranges(transformer(weights, "float32"))[2]
    for name in weights:
        if name.endswith("feed_forward.w2.weight"):
            weights[name] = weights[name] * np.float32(FEED_FORWARD / out)
    return weights


def psnr(actual: mx.array, expected: mx.array) -> float:
    """In dB, over the range of what is expected."""
    a, b = (np.array(array.astype(mx.float32), np.float64) for array in (actual, expected))
    return float(20 * np.log10((b.max() - b.min()) / np.sqrt(np.mean((a - b) ** 2))))


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks without the factors."""
    monkeypatch.setattr(half, "_ATTENTION", 1.0)
    monkeypatch.setattr(half, "_FEED_FORWARD", 1.0)


def in_pieces(model: Transformer) -> None:
    model.run = running.RunInPieces(running.on_gpu()).block


def in_blocks(model: Transformer) -> None:
    model.run = running.BlockRunner()


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU, blocks and pieces are programs; they are traced and not built, which would need a compiler."""
    monkeypatch.setattr(running, "on_gpu", lambda: True)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("run", daily([in_blocks, in_pieces], in_pieces))
def test_programs_hold_them(hot: dict[str, np.ndarray], run: Callable[[Transformer], None]) -> None:
    model = transformer(hot, "float16")
    run(model)
    assert psnr(model(*inputs()), transformer(hot, "float32")(*inputs())) > 50


@pytest.mark.parametrize("run", daily([Block.__call__, in_blocks, in_pieces], Block.__call__, in_pieces))
def test_float16_holds_the_values_of_the_real_model(hot: dict[str, np.ndarray], run: Any) -> None:
    exact = transformer(hot, "float32")
    assert ranges(exact) == pytest.approx((ATTENTION, PRODUCT, FEED_FORWARD), rel=0.1)
    expected = transformer(hot, "float32")(*inputs())
    model = transformer(hot, "float16")
    if run is not Block.__call__:
        run(model)
    made = model(*inputs())
    matrices = [a for name, a in tree_flatten(model.parameters()) if name.endswith("weight") and a.ndim == 2]
    assert {a.dtype for a in matrices} == {mx.float16} and made.dtype == model.dtype == mx.float32
    assert np.isfinite(np.array(made)).all() and psnr(made, expected) > 50
    assert psnr(transformer(hot, "bfloat16")(*inputs()), expected) < psnr(made, expected) - 10


def test_the_matrices_are_multiplied_in_float16(hot: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    call = nn.Linear.__call__
    block = transformer(hot, "float16").layers[0]
    monkeypatch.setattr("mlx.nn.Linear.__call__", lambda self, x: seen.append(x.dtype) or call(self, x))
    model = transformer(hot, "float16")
    rotation = model.layout([9], 12, 20).rotation
    stream = mx.zeros((1, rotation[0].shape[1], CONFIG.dim))
    assert block(stream, rotation, None, mx.zeros((1, CONFIG.adaln_dim))).dtype == mx.float32
    assert seen == [mx.float32] + 7 * [mx.float16]  # modulation, then q, k, v, out, w1, w3, w2


def test_plain_float16_overflows(hot: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    plain(monkeypatch)
    assert not np.isfinite(np.array(transformer(hot, "float16")(*inputs()))).all()


@pytest.mark.parametrize(("bits", "batch"), daily([(None, 1), (None, 2), (8, 1), (8, 2)], (None, 2), (8, 1)))
def test_the_gradient_holds_them_too(hot: dict[str, np.ndarray], bits: int | None, batch: int) -> None:
    """Of the input and of LoRAs, through one block, against float32. bits: the base is quantized."""
    results = []
    for dtype in ("float32", "float16"):
        model = transformer(hot, dtype)
        block, names = model.layers[1], ["attention.to_v", "attention.to_out.0", "feed_forward.w2", "feed_forward.w3"]
        if bits:
            nn.quantize(block.attention, 32, bits)
        add_trainable_loras(block, names, 2, 2.0, np.random.default_rng(0))
        layout = model.layout([9] * batch, 12, 20)
        x, d = (
            mx.random.normal((batch, layout.rotation[0].shape[1], CONFIG.dim), key=mx.random.key(i)) for i in (1, 2)
        )
        adaln = mx.random.normal((batch, CONFIG.adaln_dim), key=mx.random.key(3))
        context = BlockContext(layout.rotation, layout.mask, adaln)
        _, kept = forward(block, x, context)
        d_x, _, gradients = backward(block, kept, context, 0.01 * d)
        results.append([d_x, *(gradients[name] for name in sorted(gradients))])
        assert kept.attention.out.dtype == kept.feed_forward.out.dtype == getattr(mx, dtype)
    for exact, made in zip(*results, strict=True):
        assert float(mx.abs(exact).max().item()) == 0 or psnr(made, exact) > 45


def test_the_other_networks_stay_in_bfloat16(model_dir: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(model_dir, "float16")
    assert isinstance(pipe.vae, VAE)
    expected = {"vae": mx.bfloat16, "text_encoder": mx.bfloat16, "transformer": mx.float16}
    for name, dtype in expected.items():
        assert {array.dtype for _, array in tree_flatten(getattr(pipe, name).parameters())} == {dtype}


def test_a_picture_in_float16_is_that_of_float32() -> None:
    exact, made = (
        ZImagePipeline.from_pretrained(TINY, dtype)("a red circle", width=64, height=64, steps=4)
        for dtype in ("float32", "float16")
    )
    assert psnr(mx.array(np.asarray(made, np.float32)), mx.array(np.asarray(exact, np.float32))) > 36
