"""The ControlNet of Z-Image in NumPy: blocks beside those of the transformer, which add hints to its stream.

    c = before_proj(c) + x          before the first block of a stack; x are the tokens of the transformer there
    c = block(c)
    hint = after_proj(c)            times the scale, added after the layer of the transformer that has its place

It uses the embedders, the refined captions and the rotations of the transformer. Source: controlnet_z_image.py of
diffusers (ZImageControlNetModel). As there, hints for the noise refiner reach only the tokens that the ControlNet sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.checks import check_maps
from zimage_ref.model.control import OWN, PLAIN, SHARED, ControlNetConfig

from .ops import linear
from .transformer import Block, Conditioning, Transformer
from .weights import Weights


class ControlBlock(Block):
    """A block of the transformer that makes a hint."""

    def enter(self, c: Array, x: Array) -> Array:
        """The input of the first block of a stack, of control tokens c and the transformer's x, (B, S, D) each."""
        start: Array = linear(c, self.w["before_proj.weight"], self.w["before_proj.bias"]) + x
        return start

    def hint(self, c: Array) -> Array:
        """The hint (B, S, D) of the block's output c (B, S, D)."""
        return linear(c, self.w["after_proj.weight"], self.w["after_proj.bias"])


class ControlNet:
    """The whole ControlNet, of any variant."""

    def __init__(self, config: ControlNetConfig, weights: Weights) -> None:
        self.config, self.w = config, weights
        blocks, refiners = config.blocks, range(config.n_refiner_layers)
        self.control_layers = [
            ControlBlock(weights.at(f"{SHARED}.{i}"), blocks) for i in range(len(config.control_layers_places))
        ]
        self.plain_refiner: list[Block] = []  # 1.0
        self.refiner = self.control_layers  # 2.0
        if config.refiner == PLAIN:
            self.plain_refiner = [Block(weights.at(f"{OWN}.{i}"), blocks) for i in refiners]
        elif config.refiner == OWN:
            self.refiner = [ControlBlock(weights.at(f"{OWN}.{i}"), blocks) for i in refiners]

    def embed(self, context: Array, transformer: Transformer) -> Array:
        """The control picture, (B, control_in_dim, h, w), as tokens (B, L, D), filled up as those of the picture."""
        check_maps("control", context.shape, self.config.control_in_dim, self.config.patch_size)
        embedder = self.w.at(f"control_all_x_embedder.{transformer.config.patch_key}")
        return transformer.embed_patches(context.astype(self.w.dtype), embedder)


@dataclass(frozen=True)
class Control:
    """A ControlNet with its control picture and its scale: a `transformer.Hints`."""

    network: ControlNet
    context: Array  # (1, control_in_dim, h, w)
    scale: float

    @property
    def places(self) -> tuple[int, ...]:
        """The layers of the transformer that get a hint."""
        return self.network.config.control_layers_places

    def hints(
        self, transformer: Transformer, embedded: Array, refined: Array, conditioning: Conditioning, adaln: Array
    ) -> Iterator[Array]:
        """Yields a hint (B, S, D) for each of `places`; see `transformer.Hints`."""
        c = self.network.embed(self.context, transformer)  # (1, L, D)
        c = np.broadcast_to(c, embedded.shape)
        c, x = self._refine(transformer, c, embedded, refined, conditioning, adaln)
        c = np.concatenate([c, conditioning.caption], axis=1)  # (B, S, D)
        x = np.concatenate([x, conditioning.caption], axis=1)
        for i, block in enumerate(self.network.control_layers):
            c = block(c if i else block.enter(c, x), conditioning.rotation, conditioning.mask, adaln)
            yield block.hint(c) * self.scale

    def _refine(
        self, transformer: Transformer, c: Array, embedded: Array, refined: Array, conditioning: Conditioning,
        adaln: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        """The first tokens of the control picture, and those of the picture as the ControlNet sees them, (B, L, D)."""
        rotation = conditioning.image_rotation
        if self.network.plain_refiner:
            for plain in self.network.plain_refiner:
                c = plain(c, rotation, None, adaln)
            return c, refined
        hints = {}
        for i, block in enumerate(self.network.refiner):
            c = block(c if i else block.enter(c, embedded), rotation, None, adaln)
            if i < len(self.network.config.control_refiner_layers_places):
                hints[self.network.config.control_refiner_layers_places[i]] = block.hint(c) * self.scale
        x = embedded
        for i, refiner in enumerate(transformer.noise_refiner):
            x = refiner(x, rotation, None, adaln)
            x = x + hints[i] if i in hints else x
        return c, x
