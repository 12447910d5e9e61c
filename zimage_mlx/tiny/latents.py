"""Measures the latents of the tiny autoencoder, and makes the variances of their directions more equal.

An autoencoder that learns only reconstruction gives colours hundreds of times the variance of outlines. Noise would
then hide outlines until the last of the denoiser's eight steps. So the latents get a new basis. In it, the variance of
each direction is the square root of the old one. The change of basis is multiplied into the convolutions before and
after the latents, so pictures do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np

from zimage_mlx.networks.vae import VAE
from zimage_ref.formats.tensors import Array

from .losses import to_signed

_BATCH = 250


def finish(vae: VAE, pictures: Array) -> None:
    """Changes the basis of the latents, and sets shift_factor and scaling_factor to their mean and deviation.

    Both are measured on `pictures` (N, H, W, 3) uint8.
    """
    mean, variance = moments(vae, pictures)
    basis = evening(mean)
    _fold(vae, basis, variance)
    even = mean @ basis.T
    vae.config = replace(
        vae.config, shift_factor=round(float(even.mean()), 5), scaling_factor=round(1 / float(even.std()), 5)
    )


def in_batches(pictures: Array) -> Iterator[Array]:
    """`pictures` in batches of a size that the autoencoder can process."""
    yield from (pictures[i : i + _BATCH] for i in range(0, len(pictures), _BATCH))


def moments(vae: VAE, pictures: Array) -> tuple[Array, Array]:
    """The posterior's mean in every cell (cells, C), and its variance (C,) averaged over all cells."""
    means, variances = [], []
    for batch in in_batches(pictures):
        h = vae.encoder(to_signed(mx.array(batch)))  # (B, h, w, 2C)
        mean, log_variance = (np.array(part, np.float64).reshape(-1, part.shape[-1]) for part in mx.split(h, 2, -1))
        means.append(mean)
        variances.append(np.exp(log_variance).mean(0))
    return np.concatenate(means), np.mean(variances, axis=0)


def evening(latents: Array) -> Array:
    """The symmetric matrix (C, C) that gives each direction of `latents` (cells, C) the square root of its variance."""
    variance, directions = np.linalg.eigh(np.cov(latents.T))
    return np.asarray((directions * variance**-0.25) @ directions.T)


def _fold(vae: VAE, basis: Array, variance: Array) -> None:
    """Changes the last convolution of the encoder to give basis @ latents, and the first of the decoder to take them.

    The variance of the posterior becomes the same in every cell: the mean `variance`, in the new basis.
    """
    C = len(basis)
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    weight, bias = np.array(last.weight, np.float64), np.array(last.bias, np.float64)  # (2C, 3, 3, D), (2C,)
    weight[:C], weight[C:] = np.einsum("oc,cyxd->oyxd", basis, weight[:C]), 0
    bias[:C], bias[C:] = basis @ bias[:C], np.log(basis**2 @ variance)
    last.weight, last.bias = mx.array(weight.astype(np.float32)), mx.array(bias.astype(np.float32))
    back = np.array(first.weight, np.float64) @ np.linalg.inv(basis)  # (D, 3, 3, C)
    first.weight = mx.array(back.astype(np.float32))
