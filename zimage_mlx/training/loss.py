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
class Distance:
    """How far a prediction is from its target.

    mse     the square e^2 of the error e
    mae     its absolute value
    huber   e^2 up to `delta`, from there on delta (2 |e| - delta): without a jump, and as steep as a straight line

    guidance: the target is moved away from the prediction, so that the error is `guidance` times as large. Source:
    differential guidance of ai-toolkit.
    """

    kind: str = "mse"
    delta: float = 0.1
    guidance: float = 1.0

    def __call__(self, raw: mx.array, target: mx.array) -> mx.array:
        """The distance of each element, float32."""
        if self.guidance != 1:
            fixed = mx.stop_gradient(raw)
            target = fixed + self.guidance * (target - fixed)
        error = raw - target
        if self.kind == "mse":
            return mx.square(error)
        size = mx.abs(error)
        if self.kind == "mae":
            return size
        return mx.where(size <= self.delta, mx.square(error), self.delta * (2 * size - self.delta))


@dataclass(frozen=True)
class NoisyBatch:
    """Pictures of one size, noised and captioned."""

    x_0: mx.array  # (B, C, h, w) float32
    noise: mx.array  # (B, C, h, w) float32
    sigma: mx.array  # (B,) float32
    captions: Sequence[mx.array]  # B arrays (T_i, cap_feat_dim)
    weight: mx.array | None = None  # (B,) float32; None is 1
    mask: mx.array | None = None  # (B, 1, h, w) float32, the weight of each latent; None is 1
    target: mx.array | None = None  # (B, C, h, w) float32; None is x_0 - noise
    distance: Distance = Distance()

    @property
    def x_sigma(self) -> mx.array:
        """(B, C, h, w): the pictures with their noise."""
        return add_noise(self.x_0, self.noise, self.sigma[:, None, None, None])

    def error(self, raw: mx.array) -> mx.array:
        """The weighted mean error, a float32 scalar, of what the transformer made of the batch, (B, C, h, w)."""
        target = training_target(self.x_0, self.noise) if self.target is None else self.target
        errors = self.distance(raw.astype(mx.float32), target)
        if self.mask is None:
            losses = mx.mean(errors, axis=(1, 2, 3))  # (B,)
        else:
            by_place = mx.mean(errors, axis=1, keepdims=True)  # (B, 1, h, w)
            losses = mx.sum(self.mask * by_place, axis=(1, 2, 3)) / mx.sum(self.mask, axis=(1, 2, 3))
        return mx.mean(losses if self.weight is None else self.weight * losses)


@dataclass(frozen=True)
class JointBatch:
    """Batches of one size that go through the transformer in one pass. Their errors are summed by weight."""

    parts: Sequence[tuple[float, NoisyBatch]]

    @property
    def x_sigma(self) -> mx.array:
        """(B, C, h, w), B the pictures of all parts."""
        return mx.concatenate([part.x_sigma for _, part in self.parts])

    @property
    def sigma(self) -> mx.array:
        """(B,)."""
        return mx.concatenate([part.sigma for _, part in self.parts])

    @property
    def captions(self) -> Sequence[mx.array]:
        """B arrays (T_i, cap_feat_dim)."""
        return [caption for _, part in self.parts for caption in part.captions]

    def error(self, raw: mx.array) -> mx.array:
        """The sum of the parts' errors by weight, a float32 scalar. raw: (B, C, h, w)."""
        total, first = mx.array(0.0), 0
        for weight, part in self.parts:
            total = total + weight * part.error(raw[first : first + len(part.captions)])
            first += len(part.captions)
        return total


def flow_matching_loss(model: Transformer, batch: NoisyBatch) -> mx.array:
    """The loss of `batch`, a float32 scalar."""
    return batch.error(model(batch.x_sigma, model_time(batch.sigma), batch.captions))
