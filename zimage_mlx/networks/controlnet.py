"""The ControlNet of Z-Image on MLX: blocks beside those of the transformer, which add hints to its stream.

    c = before_proj(c) + x          before the first block of a stack; x are the tokens of the transformer there
    c = block(c)
    hint = after_proj(c)            times the scale, added after the layer of the transformer that has its place

Source: controlnet_z_image.py of diffusers (ZImageControlNetModel). As there, hints for the noise refiner reach only the
tokens that the ControlNet sees. Attribute names are the checkpoint's. Its twin is zimage_ref.networks.controlnet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.model.checks import check_maps
from zimage_ref.model.config import TransformerConfig
from zimage_ref.model.control import OWN, PLAIN, SHARED, ControlNetConfig

from .ops import in_rows
from .transformer import Block, Conditioning, RunBlock, Transformer


class ControlBlock(Block):
    """A block of the transformer that makes a hint."""

    def __init__(self, config: TransformerConfig, first: bool) -> None:
        super().__init__(config)
        if first:
            self.before_proj = nn.Linear(config.dim, config.dim)
        self.after_proj = nn.Linear(config.dim, config.dim)

    def enter(self, c: mx.array, x: mx.array) -> mx.array:
        """The input of the first block of a stack, of control tokens c and the transformer's x, (B, S, D) each."""
        return in_rows(self.before_proj, c, c.shape[-1]) + x

    def hint(self, c: mx.array) -> mx.array:
        """The hint (B, S, D) of the block's output c (B, S, D)."""
        return in_rows(self.after_proj, c, c.shape[-1])


class ControlNet(nn.Module):
    """The whole ControlNet, of any variant."""

    def __init__(self, config: ControlNetConfig, run: RunBlock = Block.__call__) -> None:
        """run: how its blocks are run. They are in memory, whatever becomes of those of the transformer."""
        super().__init__()
        self.run = run
        self.config, blocks, refiners = config, config.blocks, range(config.n_refiner_layers)
        self.control_all_x_embedder = {blocks.patch_key: nn.Linear(config.patch_dim, config.dim)}
        self.control_layers = [ControlBlock(blocks, first=not place) for place in config.control_layers_places]
        if config.refiner == PLAIN:
            self.control_noise_refiner = [Block(blocks) for _ in refiners]
        elif config.refiner == OWN:
            self.control_noise_refiner = [ControlBlock(blocks, first=not i) for i in refiners]

    @property
    def refiner(self) -> list[ControlBlock]:
        """The control blocks that make the first tokens, in all variants but 1.0."""
        return self.control_layers if self.config.refiner == SHARED else cast(list[ControlBlock], self[OWN])

    def embed(self, context: mx.array, transformer: Transformer) -> mx.array:
        """The control picture, (B, control_in_dim, h, w), as tokens (B, L, D), filled up as those of the picture."""
        check_maps("control", context.shape, self.config.control_in_dim, self.config.patch_size)
        return transformer.embed_patches(context, self.control_all_x_embedder[transformer.config.patch_key])


@dataclass(frozen=True)
class Control:
    """A ControlNet with its control picture and its scale: a `transformer.Hints`."""

    network: ControlNet
    context: mx.array  # (1, control_in_dim, h, w)
    scale: float

    @property
    def places(self) -> tuple[int, ...]:
        """The layers of the transformer that get a hint."""
        return self.network.config.control_layers_places

    def hints(
        self, transformer: Transformer, embedded: mx.array, refined: mx.array, conditioning: Conditioning,
        adaln: mx.array,
    ) -> Iterator[mx.array]:  # fmt: skip
        """Yields a hint (B, S, D) for each of `places`; see `transformer.Hints`."""
        layout, caption = conditioning.layout, conditioning.caption
        c = mx.broadcast_to(self.network.embed(self.context, transformer), embedded.shape)  # (B, L, D)
        c, x = self._refine(transformer, c, embedded, refined, conditioning, adaln)
        c = mx.concatenate([c, caption], axis=1)  # (B, S, D)
        x = mx.concatenate([x, caption], axis=1)
        for i, block in enumerate(self.network.control_layers):
            c = self.network.run(block, c if i else block.enter(c, x), layout.rotation, layout.mask, adaln)
            yield block.hint(c) * self.scale

    def _refine(
        self, transformer: Transformer, c: mx.array, embedded: mx.array, refined: mx.array, conditioning: Conditioning,
        adaln: mx.array,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        """The first tokens of the control picture, and those of the picture as the ControlNet sees them, (B, L, D)."""
        run, rotation, places = self.network.run, conditioning.layout.image_rotation, self.network.config
        if places.refiner == PLAIN:
            for plain in self.network.control_noise_refiner:
                c = run(plain, c, rotation, None, adaln)
            return c, refined
        hints = {}
        for i, block in enumerate(self.network.refiner):
            c = run(block, c if i else block.enter(c, embedded), rotation, None, adaln)
            if i < len(places.control_refiner_layers_places):
                hints[places.control_refiner_layers_places[i]] = block.hint(c) * self.scale
        x = embedded
        for i, refiner in enumerate(transformer.noise_refiner):
            x = transformer.run(refiner, x, rotation, None, adaln)
            x = x + hints[i] if i in hints else x
        return c, x
