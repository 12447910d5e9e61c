"""The block-by-block gradient: MLX's own through the whole network is its oracle, in every mode of keeping."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.daily import daily
from support.networks import HAS_MLX, mlx_only, network
from support.parity import assert_parity

from zimage_ref.memory import kept_values, kept_widths
from zimage_ref.model import parameters
from zimage_ref.model.config import OFFICIAL_TRANSFORMER

if HAS_MLX:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from support.mlx_memory import measured_from

    from zimage_mlx.lora import layers as lora_layers
    from zimage_mlx.networks import fused_attention, ops
    from zimage_mlx.networks.compiled import PerBlock
    from zimage_mlx.networks.transformer import Block
    from zimage_mlx.networks.tree import find, replace
    from zimage_mlx.training import block_gradient
    from zimage_mlx.training.gradient import LossAndGradients
    from zimage_mlx.training.loss import NoisyBatch, flow_matching_loss

pytestmark = mlx_only
SHAPES = parameters.transformer_parameters(tiny.TRANSFORMER)
WEIGHTS = tiny.random_weights(SHAPES)
LAYERS = {  # what trains -> layers with a LoRA
    "every linear layer": [n.removesuffix(".weight") for n, s in SHAPES.items() if len(s) == 2 and "token" not in n],
    "main blocks": parameters.lora_modules(tiny.TRANSFORMER, ("attention", "feed_forward")),
    "one late layer": ["layers.1.feed_forward.w2"],
    "the captions' side": ["cap_embedder.1", "context_refiner.0.attention.to_k"],
}  # fmt: skip


def model_with_loras(layers: list[str]) -> Any:
    """A transformer with non-zero trainable LoRAs."""
    rng = np.random.default_rng(1)
    model = network("mlx", "transformer", tiny.TRANSFORMER, WEIGHTS, "float32")
    lora_layers.add_trainable_loras(model, layers, 3, 6.0, rng)
    for _, module in model.named_modules():
        if isinstance(module, lora_layers.LoRALinear):
            module.lora_B = mx.array(rng.standard_normal(module.lora_B.shape, dtype=np.float32) * 0.1)
    return model


def batch() -> Any:
    """Two pictures of 6 x 10 tokens, captions of 3 and 40: both paddings and the mask are used."""
    rng = np.random.default_rng(2)
    x_0, noise = (mx.array(rng.standard_normal((2, 16, 12, 20), dtype=np.float32)) for _ in range(2))
    captions = [mx.array(rng.standard_normal((n, 40), dtype=np.float32)) for n in (3, 40)]
    return NoisyBatch(x_0, noise, mx.array([0.3, 0.8]), captions, mx.array([0.5, 1.5]))


def bytes_kept(blocks: int) -> float:
    """What lets the gradient keep the residuals of so many blocks of this batch."""
    config, tokens = tiny.TRANSFORMER, 2 * (64 + 64)
    return (blocks + 0.5) * tokens * kept_values(config) * 4


@cache
def of_the_whole_network(trains: str) -> tuple[Any, dict[str, Any]]:
    """The loss and the gradients that MLX finds by itself."""
    model = model_with_loras(LAYERS[trains])
    loss, tree = nn.value_and_grad(model, flow_matching_loss)(model, batch())
    return loss, dict(tree_flatten(tree))


@pytest.mark.parametrize(
    ("trains", "keep"),
    daily(
        product(LAYERS, [0, 1, 3, 99]),
        ("every linear layer", 0), ("every linear layer", 1), ("main blocks", 0), ("main blocks", 3),
        ("one late layer", 1), ("one late layer", 99), ("the captions' side", 0), ("the captions' side", 3),
    ),
)  # fmt: skip
def test_gradients_are_those_of_the_whole_network(trains: str, keep: int, monkeypatch) -> None:
    model = model_with_loras(LAYERS[trains])
    loss, expected = of_the_whole_network(trains)
    assert len(expected) == 2 * len(LAYERS[trains])
    differentiate = LossAndGradients(model, bytes_kept(keep), compiled=False)
    kept = []
    monkeypatch.setattr(differentiate, "forward", lambda *args: kept.append(1) or block_gradient.forward(*args))
    actual_loss, actual = differentiate(batch())
    assert len(kept) == min(keep, 4)
    assert actual.keys() == expected.keys()
    assert_parity(actual_loss, loss, "same", name="loss")
    for name, array in expected.items():
        assert_parity(actual[name], array, "same", name=name)
        assert mx.abs(array).max() > 0


@pytest.mark.parametrize("trains", ["every linear layer", "one late layer"])
def test_the_feed_forward_in_rows_of_tokens_has_the_same_gradients(trains: str, monkeypatch) -> None:
    monkeypatch.setattr(block_gradient, "_FEED_FORWARD_ROWS", 100)  # 2 x 128 tokens: parts of 43, 43 and 42
    again, rows = block_gradient._hidden_again, []

    def spy(block: Any, middle: Any, modulation: Any) -> Any:
        rows.append(middle.x.shape[1])
        return again(block, middle, modulation)

    monkeypatch.setattr(block_gradient, "_hidden_again", spy)
    loss, expected = of_the_whole_network(trains)
    actual_loss, actual = LossAndGradients(model_with_loras(LAYERS[trains]), 0, compiled=False)(batch())
    assert rows[:3] == [43, 43, 42]
    assert actual.keys() == expected.keys()
    assert_parity(actual_loss, loss, "same", name="loss")
    for name, array in expected.items():
        assert_parity(actual[name], array, "same", name=name)


@pytest.mark.parametrize("keep", [0, 2])
def test_compiled_pieces_and_blocks_have_the_same_gradients(keep: int) -> None:
    model = model_with_loras(LAYERS["every linear layer"])
    expected = LossAndGradients(model, bytes_kept(keep), compiled=False)(batch())[1]
    actual = LossAndGradients(model, bytes_kept(keep), compiled=True)(batch())[1]
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_parity(actual[name], array, "same", name=name)


@pytest.mark.parametrize("modulated", [True, False])
def test_a_block_keeps_the_arrays_that_the_memory_estimate_counts(modulated: bool) -> None:
    """Names, widths and bytes, at full size; MLX knows the bytes of arrays that it has not computed."""
    config, B, S = OFFICIAL_TRANSFORMER, 2, 96
    block = Block(config, modulated)
    block.set_dtype(mx.bfloat16)
    rotation = ops.rotation_tables(mx.zeros((B, S, config.head_dim // 2)))
    adaln = mx.zeros((B, config.adaln_dim), mx.bfloat16) if modulated else None
    x = mx.zeros((B, S, config.dim), mx.bfloat16)
    _, kept = block_gradient.forward(block, x, block_gradient.BlockContext(rotation, None, adaln))
    fields = [(name, array) for half in kept for name, array in half._asdict().items()]
    of_tokens = [(name, array) for name, array in fields if name not in ("scale", "gate")]
    assert [(name, array.size / (B * S)) for name, array in of_tokens] == kept_widths(config)
    assert sum(array.nbytes for _, array in of_tokens) == B * S * kept_values(config) * 2
    others = [array.shape for name, array in fields if name in ("scale", "gate") and array is not None]
    assert others == ([(B, 1, config.dim)] * 4 if modulated else [])  # of no weight beside the tokens


def test_pieces_hold_less_than_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_QUERY_ROWS", 64)
    model, x = model_with_loras(LAYERS["main blocks"]), mx.random.normal((1, 16, 40, 40))
    large = NoisyBatch(x, x + 1, mx.array([0.3]), [mx.ones((3, 40))])
    peaks = []
    for in_pieces in (True, False):
        differentiate = LossAndGradients(model, 0, compiled=False)
        if not in_pieces:
            differentiate.run, differentiate.rerun = Block.__call__, block_gradient.backward
        mx.eval(large.x_0, large.noise)
        before = measured_from()
        differentiate(large)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < 0.75 * peaks[1]


def test_compiled_blocks_give_the_same_and_share_their_program() -> None:
    model = model_with_loras(LAYERS["main blocks"])
    run = PerBlock(Block.__call__)
    layout = model.layout([3], 12, 20)
    x = mx.random.normal((1, layout.rotation[0].shape[1], tiny.TRANSFORMER.dim), key=mx.random.key(0))
    adaln = model.embed_time(mx.array([0.4]))
    for block in model.layers:
        assert_parity(run(block, x, layout.rotation, None, adaln), block(x, layout.rotation, None, adaln), "same")
    assert run.programs == 1
    replace(
        model, [(layer, find(model, layer).base) for layer in LAYERS["main blocks"]]
    )  # another structure of the same blocks
    for block in model.layers:
        assert_parity(run(block, x, layout.rotation, None, adaln), block(x, layout.rotation, None, adaln), "same")
    assert run.programs == 2


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_chunks_of_queries_has_the_gradient_of_all_at_once(masked: bool, monkeypatch) -> None:
    monkeypatch.setattr(ops, "_QUERY_ROWS", 7)  # 20 rows: chunks of 7, 7 and 6
    q, k, v, d = (mx.random.normal((2, 3, 20, 8), key=mx.random.key(i)) for i in range(4))
    mask = mx.arange(20) < mx.array([20, 13])[:, None, None, None] if masked else None

    def gradients(attention: Any) -> Any:
        return mx.vjp(lambda q, k, v: [attention(q, k, v)], [q, k, v], [d])[1]

    def whole(q: Any, k: Any, v: Any) -> Any:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5, mask=mask)

    expected = gradients(whole)
    for name, a, b in zip("qkv", gradients(lambda q, k, v: ops.attention(q, k, v, mask)), expected, strict=True):
        assert_parity(a, b, "same", name=name)


def test_the_norm_has_gradients_of_input_and_weight() -> None:
    x, d = (mx.random.normal((2, 5, 12), key=mx.random.key(i)) for i in range(2))
    weight = mx.random.normal((12,), key=mx.random.key(3))
    ours = mx.vjp(lambda x, w: [ops.rms_norm(x, w, 1e-3)], [x, weight], [d])[1]
    theirs = mx.vjp(lambda x, w: [mx.fast.rms_norm(x, w, 1e-3)], [x, weight], [d])[1]
    for name, a, b in zip(("x", "weight"), ours, theirs, strict=True):
        assert_parity(a, b, "same", name=name)


@pytest.mark.parametrize("wanted", [False, True])
def test_pieces_make_the_gradient_of_a_scale_only_where_it_is_wanted(wanted: bool) -> None:
    model = model_with_loras(LAYERS["main blocks"])
    layout, made = model.layout([3], 12, 20), []
    x = mx.random.normal((1, layout.rotation[0].shape[1], tiny.TRANSFORMER.dim))

    def run(function: Any, *args: Any) -> Any:
        result = function(*args)
        if function not in (block_gradient._kept_again, block_gradient._hidden_again):
            made.extend(array.shape for _, array in tree_flatten(result) if isinstance(array, mx.array))
        return result

    context = block_gradient.BlockContext(layout.rotation, None, model.embed_time(mx.array([0.4])))
    block_gradient.backward(model.layers[0], x, context, x, wanted, run)
    assert made.count((1, 1, tiny.TRANSFORMER.dim)) == (4 if wanted else 0)


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_gradient_of_attention_is_that_of_the_plain_one(masked: bool) -> None:
    q, k, v, d = (mx.random.normal((2, 3, 150, 8), key=mx.random.key(i)) for i in range(4))  # filled up to 256
    mask = mx.arange(150) < mx.array([150, 93])[:, None, None, None] if masked else None

    def whole(q: Any, k: Any, v: Any) -> Any:
        return [mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5, mask=mask)]

    expected = mx.vjp(whole, [q, k, v], [d])[1]
    for name, a, b in zip("qkv", fused_attention.fused_gradient(q, k, v, d, mask), expected, strict=True):
        assert_parity(a, b, "same", name=name)


def test_attention_takes_the_fused_gradient_if_mlx_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, d = (mx.random.normal((1, 3, 20, 8), key=mx.random.key(i)) for i in range(4))
    assert not fused_attention.fused_gradient_exists(3, 8, mx.float32)  # of no device: the kernel is of 16 bits
    asked: list[object] = []

    def exists(*args: object) -> bool:
        asked.append(args)
        return True

    monkeypatch.setattr(fused_attention, "fused_gradient_exists", exists)
    monkeypatch.setattr(fused_attention, "fused_gradient", lambda q, k, v, d, mask: (q + 1, k + 2, v + 3))
    got = ops.attention_gradient(ops.QKV(q, k, v), d, d, None)
    assert asked == [(3, 8, mx.float32)]
    for a, b in zip(got, (q + 1, k + 2, v + 3), strict=True):
        assert_parity(a, b, "same")


def test_a_mask_reaches_a_gpu_as_numbers_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (mx.random.normal((2, 3, 20, 8), key=mx.random.key(i)) for i in range(3))
    mask = mx.arange(20) < mx.array([20, 13])[:, None, None, None]
    plain = ops.attention(q, k, v, mask)
    monkeypatch.setattr(ops.device, "on_gpu", lambda: True)
    seen = []
    real = mx.fast.scaled_dot_product_attention

    def spy(*args: Any, mask: Any = None, **kwargs: Any) -> Any:
        seen.append(mask)
        return real(*args, mask=mask, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    assert_parity(ops.attention(q, k, v, mask), plain, "same")
    assert (seen[0].dtype, seen[0].shape) == (mx.float32, (2, 1, 1, 20))
