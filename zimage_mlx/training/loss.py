"""The loss of flow matching.

    x_sigma = (1 - sigma) x_0 + sigma noise      loss = mean( w (raw(x_sigma, 1 - sigma, caption) - (x_0 - noise))^2 )

Noise, sigma and loss are float32; the frozen base is in its own precision. Source: train_dreambooth_lora_z_image.py of
diffusers; conventions in `zimage_ref.model.flow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from zimage_mlx.networks.transformer import Transformer
from zimage_ref.model.flow import add_noise, model_time, training_target


@dataclass(frozen=True)
class NoisyBatch:
    """Pictures of one size, noised and captioned."""

    x_0: mx.array  # (B, C, h, w) float32
    noise: mx.array  # (B, C, h, w) float32
    sigma: mx.array  # (B,) float32
    captions: Sequence[mx.array]  # B arrays (T_i, cap_feat_dim)
    weight: mx.array | None = None  # (B,) float32; None is 1


def flow_matching_loss(model: Transformer, batch: NoisyBatch) -> mx.array:
    """The loss of `batch`, a float32 scalar."""
    x = add_noise(batch.x_0, batch.noise, batch.sigma[:, None, None, None])
    return flow_matching_error(model(x, model_time(batch.sigma), batch.captions), batch)


def flow_matching_error(raw: mx.array, batch: NoisyBatch) -> mx.array:
    """The weighted mean squared error, a float32 scalar, of what the transformer made of `batch`, (B, C, h, w)."""
    difference = raw.astype(mx.float32) - training_target(batch.x_0, batch.noise)
    losses = mx.mean(mx.square(difference), axis=(1, 2, 3))  # (B,)
    return mx.mean(losses if batch.weight is None else batch.weight * losses)
