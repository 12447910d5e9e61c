"""The loss of flow matching, and its gradients.

    x_sigma = (1 - sigma) x_0 + sigma noise      loss = mean( w (raw(x_sigma, 1 - sigma, caption) - (x_0 - noise))^2 )

Noise, sigma and loss are float32; the frozen base is in its own precision. Source: train_dreambooth_lora_z_image.py of
diffusers; conventions in `zimage_ref.schedule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from zimage_ref.schedule import add_noise, model_time, training_target

from .transformer import Transformer

Parameters = dict[str, mx.array]  # LoRA parameters, or their gradients, by name


@dataclass(frozen=True)
class Batch:
    """Pictures of one size, noised and captioned."""

    x_0: mx.array  # (B, C, h, w) float32
    noise: mx.array  # (B, C, h, w) float32
    sigma: mx.array  # (B,) float32
    weight: mx.array  # (B,) float32
    captions: Sequence[mx.array]  # B arrays (T_i, cap_feat_dim)


def flow_matching_loss(
    model: Transformer,
    x_0: mx.array,
    noise: mx.array,
    sigma: mx.array,
    captions: Sequence[mx.array],
    weight: mx.array | None = None,
) -> mx.array:
    """The loss, a float32 scalar, of pictures x_0 (B, C, h, w) with noise (B, C, h, w) at sigma (B,)."""
    x = add_noise(x_0, noise, sigma[:, None, None, None])
    raw = model(x, model_time(sigma), captions).astype(mx.float32)
    losses = mx.mean(mx.square(raw - training_target(x_0, noise)), axis=(1, 2, 3))  # (B,)
    return mx.mean(losses if weight is None else weight * losses)


def loss_and_gradients(model: Transformer, batch: Batch) -> tuple[mx.array, Parameters]:
    """The loss of `batch` and its gradients with respect to the trainable parameters, computed."""
    differentiate: Any = nn.value_and_grad(model, flow_matching_loss)
    loss, tree = differentiate(model, batch.x_0, batch.noise, batch.sigma, batch.captions, batch.weight)
    gradients = dict(tree_flatten(tree))
    mx.eval(loss, gradients)
    return loss, gradients
