"""LoRA: branch and merge agree, gradients are the reference's, and every parameter of the MLX networks has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import cases, tiny
from support.cases import LAYERS, random_lora
from support.daily import daily
from support.networks import HAS_MLX, PARAMETERS, mlx_only, native, network
from support.parity import assert_parity

from zimage_ref.lora.arithmetic import NumPyArithmetic
from zimage_ref.lora.low_rank import LowRank
from zimage_ref.lora.updates import LoRA, by_parameter
from zimage_ref.model import parameters
from zimage_ref.model.flow import add_noise, model_time, training_target

if HAS_MLX:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    from zimage_mlx.lora import layers as mlx_lora
    from zimage_mlx.lora.arithmetic import MLXArithmetic, updated
    from zimage_mlx.networks import ops
    from zimage_mlx.training import block_gradient
    from zimage_mlx.training.gradient import LossAndGradients
    from zimage_mlx.training.loss import NoisyBatch

CONFIG = tiny.TRANSFORMER
WEIGHTS = tiny.random_weights(parameters.transformer_parameters(CONFIG))
INPUTS = cases.transformer_inputs(CONFIG, "batch", seed=5)  # two captions, both kinds of padding, a mask


def reference(loras: list[tuple[LoRA, float]], weights: dict[str, np.ndarray] = WEIGHTS) -> Any:
    model = network("numpy", "transformer", CONFIG, weights, "float64")
    model.w.use_loras(loras)
    return model(INPUTS["x"], INPUTS["t"], cases.captions(INPUTS))


def on_mlx(model: Any) -> Any:
    captions = [mx.array(c) for c in cases.captions(INPUTS)]
    return model(mx.array(INPUTS["x"]), mx.array(INPUTS["t"]), captions)


def mlx_transformer(dtype: str = "float32") -> Any:
    return network("mlx", "transformer", CONFIG, WEIGHTS, dtype)


def attach(model: Any, loras: list[tuple[LoRA, float]]) -> Any:
    """Low-rank LoRAs as branches, which need no weight to be read again."""
    adapters = mlx_lora.Adapters(model, reload=lambda name: mx.array(WEIGHTS[name]), merge=False)
    adapters.use(loras)
    return adapters


def test_the_reference_merges_what_the_formula_says() -> None:
    first, second = random_lora(3, seed=1), random_lora(5, seed=2, layers=LAYERS[2:9])
    merged = dict(WEIGHTS)
    for lora, scale in ((first, 0.7), (second, -1.3)):
        for layer, factors in lora.items():
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + scale * (factors.B.astype("f8") @ factors.A)
    actual = reference([(first, 0.7), (second, -1.3)])
    assert_parity(actual, reference([], merged), "same", "float64")
    assert np.abs(actual - reference([])).max() > 0.1


def test_the_reference_forgets_a_lora_that_is_replaced() -> None:
    model = network("numpy", "transformer", CONFIG, WEIGHTS, "float64")
    plain = model(INPUTS["x"], INPUTS["t"], cases.captions(INPUTS))
    model.w.use_loras([(random_lora(3, seed=1), 1.0)])
    model.w.use_loras([])
    np.testing.assert_array_equal(model(INPUTS["x"], INPUTS["t"], cases.captions(INPUTS)), plain)


@mlx_only
def test_branches_beside_the_layers_equal_the_merged_reference() -> None:
    loras = [(random_lora(3, seed=1), 0.7), (random_lora(5, seed=2, layers=LAYERS[2:9]), -1.3)]
    model = mlx_transformer()
    attach(model, loras)
    assert_parity(on_mlx(model), reference(loras), "twin")


@mlx_only
def test_branches_keep_a_bfloat16_stream_bfloat16() -> None:
    loras = [(random_lora(3, seed=1), 0.7)]
    model = mlx_transformer("bfloat16")
    attach(model, loras)
    assert_parity(on_mlx(model), reference(loras), "twin", "bfloat16")


@mlx_only
def test_detaching_and_a_scale_of_zero_give_the_base_model_again() -> None:
    model = mlx_transformer()
    plain = np.array(on_mlx(model))
    adapters = attach(model, [(random_lora(3, seed=1), 1.0)])
    assert np.abs(np.array(on_mlx(model)) - plain).max() > 0.1
    adapters.use([(random_lora(3, seed=1), 0.0)])
    np.testing.assert_array_equal(np.array(on_mlx(model)), plain)
    assert dict(tree_flatten(model.parameters())).keys() == WEIGHTS.keys()


@mlx_only
def test_a_fresh_lora_changes_nothing_at_all_and_is_all_that_trains() -> None:
    model = mlx_transformer()
    plain = np.array(on_mlx(model))
    mlx_lora.add_trainable_loras(model, LAYERS, rank=4, alpha=2.0, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(np.array(on_mlx(model)), plain)
    trainable = dict(tree_flatten(model.trainable_parameters()))
    assert trainable.keys() == {f"{layer}.lora_{half}" for layer in LAYERS for half in "AB"}
    assert {array.dtype for array in trainable.values()} == {mx.float32}


@mlx_only
def test_fresh_factors_are_kaiming_uniform_and_zero() -> None:
    model = mlx_transformer()
    mlx_lora.add_trainable_loras(model, LAYERS, rank=64, alpha=64.0, rng=np.random.default_rng(0))
    for layer, factors in mlx_lora.trained_loras(model).items():
        bound = WEIGHTS[f"{layer}.weight"].shape[1] ** -0.5
        assert not factors.B.any()
        assert 0.98 * bound < np.abs(factors.A).max() <= bound and abs(factors.A.mean()) < 0.05 * bound
        assert np.std(factors.A) == pytest.approx(bound / 3**0.5, rel=0.05)


@mlx_only
@pytest.mark.parametrize(("tokens", "rows"), daily([(2304, 768), (50, 30)], (50, 30)))
def test_lora_gradients_are_those_of_the_reference_loss(
    tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each matrix's gradient along a random direction, with central differences of zimage_ref in float64.

    The second time, the feed-forward and attention go in several parts.
    """
    monkeypatch.setattr(block_gradient, "_FEED_FORWARD_ROWS", tokens)
    monkeypatch.setattr(ops, "_FEWER_ROWS", rows)
    rng = np.random.default_rng(3)
    model = mlx_transformer()
    mlx_lora.add_trainable_loras(model, LAYERS, rank=3, alpha=1.2, rng=rng)  # alpha / rank is not 1
    model.apply_to_modules(lambda name, m: name in LAYERS and m.update({"lora_B": mx.array(like(m.lora_B, rng) * 0.3)}))
    x_0, noise = rng.standard_normal((2, *INPUTS["x"].shape)).astype(np.float32)
    batch = [native("mlx", a) for a in (x_0, noise, INPUTS["t"])]
    captions = [mx.array(c) for c in cases.captions(INPUTS)]
    loss, flat = LossAndGradients(model, budget=0, compiled=False)(NoisyBatch(*batch, captions))
    lora = mlx_lora.trained_loras(model)
    twin = network("numpy", "transformer", CONFIG, WEIGHTS, "float64")

    def reference_loss(lora: LoRA) -> float:
        twin.w.use_loras([(lora, 1.0)])
        sigma = INPUTS["t"].astype(np.float64)
        x = add_noise(x_0, noise, sigma[:, None, None, None])
        raw = twin(x, model_time(sigma), cases.captions(INPUTS))
        return float(np.mean((raw - training_target(x_0, noise)) ** 2))

    assert_parity(np.float32(loss.item()), np.float64(reference_loss(lora)), "twin", name="loss")
    actual, expected = [], []
    for layer in LAYERS:
        for half in "AB":
            direction = like(getattr(lora[layer], half), rng)
            direction /= np.linalg.norm(direction)
            actual.append(np.sum(np.array(flat[f"{layer}.lora_{half}"]) * direction))
            ends = [reference_loss(lora | {layer: moved(lora[layer], half, h * direction)}) for h in (H, -H)]
            expected.append((ends[0] - ends[1]) / (2 * H))
    assert len(actual) == 2 * len(LAYERS) and min(map(abs, expected)) > 1e-7
    assert_parity(np.array(actual, np.float32), np.array(expected), "gradient")


H = 1e-4  # step of central differences: their error falls with its square, rounding stays below 1e-11


def moved(factors: LowRank, half: str, by: np.ndarray) -> LowRank:
    halves = {"A": factors.A.astype(np.float64), "B": factors.B.astype(np.float64)}
    return LowRank(**(halves | {half: halves[half] + by}), scale=factors.scale)


def like(array: Any, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(array.shape)


def transformer_output(model: Any) -> Any:
    return on_mlx(model)


def text_encoder_output(model: Any) -> Any:
    return model(mx.array(np.arange(9) * 7 % tiny.TEXT_ENCODER.vocab_size))


def vae_output(model: Any) -> Any:
    images = mx.array(cases.image_batch(tiny.VAE, seed=0))
    latents = mx.array(np.random.RandomState(0).standard_normal((1, 16, 3, 2)))
    return mx.concatenate([model.encode(images).flatten(), model.decode(latents).flatten()])


@mlx_only
@pytest.mark.parametrize(
    ("component", "config", "output"),
    [
        ("transformer", tiny.TRANSFORMER, transformer_output),
        ("text_encoder", tiny.TEXT_ENCODER, text_encoder_output),
        ("vae", tiny.VAE, vae_output),
    ],
    ids=["transformer", "text_encoder", "vae"],
)
def test_every_parameter_has_a_gradient(component: str, config: Any, output: Callable[[Any], Any]) -> None:
    """A tensor that is loaded and then not used, or used where nothing depends on it, would have none."""
    weights = tiny.random_weights(PARAMETERS[component](config))
    model = network("mlx", component, config, weights, "float32")

    def total(model: Any) -> Any:
        values = output(model).flatten()
        return mx.sum(values * mx.array(np.random.RandomState(1).standard_normal(values.size)).astype(mx.float32))

    _, gradients = nn.value_and_grad(model, total)(model)
    largest = {name: float(mx.abs(g).max().item()) for name, g in tree_flatten(gradients)}
    unused = parameters.text_encoder_unused(config) if component == "text_encoder" else set()
    assert largest.keys() == weights.keys() - unused
    flat = {name for name, size in largest.items() if not size > 1e-3}
    # A bias on keys adds the same to every score of a query, which softmax takes out again
    assert flat == {name for name in largest if name.endswith("attentions.0.to_k.bias")}


@pytest.mark.parametrize("engine", ["numpy", pytest.param("mlx", marks=mlx_only)])
def test_a_row_of_zeros_stays_one_if_it_gets_a_norm(engine: str) -> None:
    matrix, norms = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32), np.array([[10.0], [1.0]], np.float32)
    if engine == "numpy":
        made = NumPyArithmetic(np.dtype("<f4")).with_norms(matrix, norms, 1)
    else:
        made = np.array(MLXArithmetic().with_norms(mx.array(matrix), mx.array(norms), 1))
    np.testing.assert_allclose(made, [[6, 8], [0, 0]], rtol=1e-6)


@mlx_only
def test_updates_are_added_in_float32_and_a_lora_at_0_is_left_out() -> None:
    small = LowRank(np.full((1, 8), 1.0, np.float32), np.full((4, 1), 3e-3, np.float32))
    weight = updated(mx.ones((4, 8), mx.bfloat16), [(small, 1.0), (small, 1.0)])
    assert weight.dtype == mx.bfloat16 and (np.array(weight.astype(mx.float32)) == 1 + 2**-7).all()  # 1.003 would be 1
    model = network("mlx", "transformer", CONFIG, WEIGHTS, "float32")
    layer = "layers.0.attention.to_q"
    plain = mlx_lora.find(model, layer)
    adapters = mlx_lora.Adapters(model, lambda name: mx.array(WEIGHTS[name]), False)
    lora = random_lora(2, 1, [layer])
    assert by_parameter([(lora, 0.0)]) == {} and by_parameter([(lora, 1.0)]).keys() == {f"{layer}.weight"}
    adapters.use([(lora, 0.0)])
    assert mlx_lora.find(model, layer) is plain
    adapters.use([(lora, 1.0)])
    assert mlx_lora.find(model, layer) is not plain
