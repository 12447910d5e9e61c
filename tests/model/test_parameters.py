"""Parameter names and shapes, against the published checkpoints: counts, totals and a digest of every line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
from support import tiny
from support.networks import HAS_MLX, mlx_only

from zimage_ref.errors import ConfigError
from zimage_ref.model import config as cfg
from zimage_ref.model import parameters as model_parameters

if HAS_MLX:
    from mlx.utils import tree_flatten

    from zimage_mlx.networks.text_encoder import TextEncoder
    from zimage_mlx.networks.transformer import Transformer
    from zimage_mlx.networks.vae import VAE

# Official config, tensors, parameters, sha256 of the sorted lines "name [shape]" of the published files
PUBLISHED = {
    "transformer": (
        model_parameters.transformer_parameters, cfg.OFFICIAL_TRANSFORMER, 521, 6_154_908_736,
        "c9eb1b42cea6e4066a7434f6f1bf3125d8e6c066a2258f3154adaaddbcece546",
    ),
    "text_encoder": (
        model_parameters.text_encoder_parameters, cfg.OFFICIAL_TEXT_ENCODER, 398, 4_022_468_096,
        "53cf7a82ad0357d0fe5d43001624a3771f2e624c6856dbcd73924c0a45b66987",
    ),
    "vae": (
        model_parameters.vae_parameters, cfg.OFFICIAL_VAE, 244, 83_819_683,
        "0287a108a616e46a1af78dc1d89b8e861e1c501b2bc6e2998426c1295a43afd6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("component", PUBLISHED)
def test_the_official_configs_give_the_published_names_and_shapes(component: str) -> None:
    parameters, config, count, total, digest = PUBLISHED[component]
    shapes = parameters(config)
    assert len(shapes) == count
    assert sum(prod(shape) for shape in shapes.values()) == total
    lines = "\n".join(sorted(f"{name} {list(shape)}" for name, shape in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


@mlx_only
@pytest.mark.parametrize("component", PUBLISHED)
def test_the_mlx_modules_have_exactly_these_parameters_at_full_size(component: str) -> None:
    build: Callable[[Any], Any] = {"transformer": Transformer, "text_encoder": TextEncoder, "vae": VAE}[component]
    parameters, config, *_ = PUBLISHED[component]
    unused = model_parameters.text_encoder_unused(config) if component == "text_encoder" else set()
    expected = {name: shape for name, shape in parameters(config).items() if name not in unused}
    built = {name: array.shape for name, array in tree_flatten(build(config).parameters())}  # lazy: nothing is computed
    assert {name: as_torch(shape) for name, shape in built.items()} == expected


def test_the_encoder_leaves_out_its_last_layer_and_final_norm_only() -> None:
    unused = model_parameters.text_encoder_unused(cfg.OFFICIAL_TEXT_ENCODER)
    assert len(unused) == 12
    assert "model.norm.weight" in unused and "model.layers.35.mlp.up_proj.weight" in unused
    assert not any(name.startswith(("model.layers.34.", "model.layers.3.", "model.embed")) for name in unused)


def test_lora_targets_select_linear_layers_in_running_order() -> None:
    every = model_parameters.lora_modules(cfg.OFFICIAL_TRANSFORMER, ("attention", "feed_forward", "refiners"))
    assert len(every) == len(set(every)) == 34 * 7
    assert every[0] == "noise_refiner.0.attention.to_q" and every[-1] == "layers.29.feed_forward.w3"
    shapes = model_parameters.transformer_parameters(cfg.OFFICIAL_TRANSFORMER)
    assert all(len(shapes[f"{layer}.weight"]) == 2 for layer in every)
    attention = model_parameters.lora_modules(cfg.OFFICIAL_TRANSFORMER, ("attention",))
    assert len(attention) == 30 * 4 and all(layer.startswith("layers.") for layer in attention)


@pytest.mark.parametrize(
    ("targets", "fact"), [(("atention",), "atention"), (("refiners",), "no layer"), ((), "no layer")]
)
def test_lora_targets_that_select_nothing_are_refused(targets: tuple[str, ...], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        model_parameters.lora_modules(tiny.TRANSFORMER, targets)


def as_torch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(O, kh, kw, I) of MLX as (O, I, kh, kw)."""
    return (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else shape
