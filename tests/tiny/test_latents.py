"""The change of basis of the tiny autoencoder's latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="the recipe needs MLX", exc_type=ImportError)

import mlx.core as mx

from zimage_mlx.networks.vae import VAE
from zimage_mlx.tiny.latents import evening, finish, moments
from zimage_mlx.tiny.recipe import NETWORKS
from zimage_ref.formats.tensors import Array
from zimage_ref.model.config import VAEConfig

CONFIG = replace(NETWORKS.vae, block_out_channels=(8, 8, 8, 8), latent_channels=4)


@pytest.fixture
def uneven() -> Callable[[], VAE]:
    """An autoencoder, one of whose latents is much stronger than the others, and all of them mixed."""

    def make(config: VAEConfig = CONFIG) -> VAE:
        mx.random.seed(3)
        vae = VAE(config)
        strength = mx.array([30.0, 3.0, 1.0, 0.3] + [1.0] * 4)
        vae.encoder.conv_out.weight = vae.encoder.conv_out.weight * strength[:, None, None, None]
        mixed = mx.random.normal((4, 4)) @ vae.encoder.conv_out.weight[:4].reshape(4, -1)
        vae.encoder.conv_out.weight[:4] = mixed.reshape(4, 3, 3, -1)
        vae.encoder.conv_out.bias = mx.random.normal((8,))
        return vae

    return make


@pytest.fixture
def pictures() -> Array:
    return np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)


def powers(latents: Array) -> Array:
    return np.sqrt(np.linalg.eigvalsh(np.cov(latents.T)))


def test_every_direction_gets_the_root_of_its_power(pictures: Array, uneven: Callable[[], VAE]) -> None:
    vae = uneven()
    before = powers(moments(vae, pictures)[0])
    finish(vae, pictures)
    after = powers(moments(vae, pictures)[0])
    assert before[-1] > 100 * before[0]
    np.testing.assert_allclose(after, np.sqrt(before), rtol=1e-3)


def test_no_picture_changes(pictures: Array, uneven: Callable[[], VAE]) -> None:
    vae = uneven()
    x = mx.random.normal((2, 3, 32, 48))
    before = np.array(vae.decode(vae.encode(x)))
    finish(vae, pictures)
    np.testing.assert_allclose(np.array(vae.decode(vae.encode(x))), before, atol=2e-4 * np.abs(before).max())


def test_the_factors_make_latents_of_mean_0_and_deviation_1(pictures: Array, uneven: Callable[[], VAE]) -> None:
    vae = uneven()
    finish(vae, pictures)
    x = mx.array(pictures.transpose(0, 3, 1, 2)).astype(mx.float32) / 127.5 - 1
    latents = np.array(vae.encode(x))
    assert abs(latents.mean()) < 1e-3 and abs(latents.std() - 1) < 1e-3


def test_the_posteriors_variance_is_that_of_the_new_basis(pictures: Array, uneven: Callable[[], VAE]) -> None:
    vae = uneven()
    latents, variance = moments(vae, pictures)
    samples = np.random.default_rng(0).standard_normal((200_000, 4)) * np.sqrt(variance)
    finish(vae, pictures)
    np.testing.assert_allclose(moments(vae, pictures)[1], (samples @ evening(latents).T).var(0), rtol=0.02)
