"""The gradient of a block in NumPy against central differences in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from zimage_ref.formats.tensors import Array, Tensor
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.parameters import transformer_parameters
from zimage_ref.networks.gradient import attention_gradient, block_gradient, rms_norm_gradient
from zimage_ref.networks.ops import attention, rms_norm
from zimage_ref.networks.transformer import Block
from zimage_ref.networks.weights import Weights

CONFIG = replace(OFFICIAL_TRANSFORMER, dim=24, n_heads=2, axes_dims=(4, 4, 4))
TOKENS = 7


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def made(rng: np.random.Generator) -> tuple[dict[str, Array], Array, Array, Array, Array]:
    """Weights of a block, x, rotation, adaln and the gradient of the output."""
    shapes = {n.removeprefix("layers.0."): s for n, s in transformer_parameters(CONFIG).items() if "layers.0." in n}
    weights = {name: rng.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape) for name, shape in shapes.items()}
    x, d_out = rng.normal(size=(1, TOKENS, CONFIG.dim)), rng.normal(size=(1, TOKENS, CONFIG.dim))
    rotation = np.exp(1j * rng.normal(size=(1, TOKENS, CONFIG.head_dim // 2)))
    return weights, x, rotation, rng.normal(size=(1, CONFIG.adaln_dim)), d_out


def block(weights: dict[str, Array]) -> Block:
    return Block(Weights({n: Tensor.of(a) for n, a in weights.items()}, np.dtype(np.float64)), CONFIG)


def test_the_gradient_of_the_input(rng: np.random.Generator) -> None:
    weights, x, rotation, adaln, d_out = made(rng)
    d_x, _ = block_gradient(block(weights), x, rotation, adaln, d_out)
    way, h = rng.normal(size=x.shape), 1e-6
    ends = [(block(weights)(x + s * h * way, rotation, None, adaln) * d_out).sum() for s in (1, -1)]
    assert (d_x * way).sum() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("name", ["attention.to_q", "attention.to_v", "attention.to_out.0", "feed_forward.w1",
                                  "feed_forward.w2", "feed_forward.w3", "attention.to_k"])  # fmt: skip
def test_the_gradient_of_a_weight(name: str, rng: np.random.Generator) -> None:
    weights, x, rotation, adaln, d_out = made(rng)
    inner, d = (a.reshape(-1, a.shape[-1]) for a in block_gradient(block(weights), x, rotation, adaln, d_out)[1][name])
    weight, h = weights[f"{name}.weight"], 1e-6
    way = rng.normal(size=weight.shape)
    ends = []
    for sign in (1, -1):
        moved = block(weights | {f"{name}.weight": weight + sign * h * way})
        ends.append((moved(x, rotation, None, adaln) * d_out).sum())
    assert (d.T @ inner * way).sum() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


def test_the_gradients_of_attention_and_norm(rng: np.random.Generator) -> None:
    q, k, v, d = (rng.normal(size=(1, 2, 5, 4)) for _ in range(4))
    way, h = rng.normal(size=q.shape), 1e-6
    ends = [(attention(q, k + s * h * way, v) * d).sum() for s in (1, -1)]
    assert (attention_gradient(q, k, v, d)[1] * way).sum() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
    weight = rng.normal(size=4)
    ends = [(rms_norm(q + s * h * way, weight, 1e-5) * d).sum() for s in (1, -1)]
    found = (rms_norm_gradient(q, weight, 1e-5, d) * way).sum()
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
