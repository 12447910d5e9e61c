"""The checks of whole layers: a block of the transformer and its gradient, a layer of the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from zimage_mlx.device import on_gpu
from zimage_mlx.lora.layers import add_trainable_loras
from zimage_mlx.networks import text_encoder, transformer
from zimage_mlx.networks.compiled import PerBlock
from zimage_mlx.networks.half import stream_dtype
from zimage_mlx.networks.ops import rotation_tables
from zimage_mlx.networks.running import BlockRunner
from zimage_mlx.networks.tree import place
from zimage_mlx.training.block_gradient import BlockContext, backward, forward
from zimage_ref.doctor.work import RANK
from zimage_ref.formats.tensors import Array
from zimage_ref.model import parameters
from zimage_ref.model.config import OFFICIAL_TEXT_ENCODER, OFFICIAL_TRANSFORMER, TextEncoderConfig, TransformerConfig
from zimage_ref.model.positions import caption_ids, image_ids, rope_angles
from zimage_ref.networks import text_encoder as reference_encoder
from zimage_ref.networks import transformer as reference_transformer
from zimage_ref.networks.gradient import block_gradient

from .cases import Size, Trial
from .numbers import DTYPES, Numbers, filled, for_numpy, on_device

_CAPTION = 64
LORA_LAYERS = [name for names in parameters.LORA_TARGETS.values() for name in names]


@dataclass(frozen=True)
class BlockTrial:
    """A block of `heads` heads on the tokens of `rows` x `rows` patches and a caption, with LoRAs on its layers."""

    rows: int
    heads: int

    @property
    def config(self) -> TransformerConfig:
        """The official one at this width."""
        return replace(OFFICIAL_TRANSFORMER, dim=128 * self.heads, n_heads=self.heads)

    @property
    def tokens(self) -> int:
        """Of picture and caption."""
        return self.rows**2 + _CAPTION

    @cached_property
    def weights(self) -> dict[str, Array]:
        """Of the block, without LoRAs."""
        shapes, prefix = parameters.transformer_parameters(self.config), "layers.0."
        own = {n.removeprefix(prefix): shape for n, shape in shapes.items() if n.startswith(prefix)}
        return Numbers.seeded(8).weights(own)

    @cached_property
    def loras(self) -> dict[str, tuple[Array, Array]]:
        """A (rank, in) and B (out, rank) of each layer, that make a tenth of what the layer makes."""
        numbers, found = Numbers.seeded(9), {}
        for name in LORA_LAYERS:
            outputs, inputs = self.weights[f"{name}.weight"].shape
            found[name] = numbers(RANK, inputs, scale=inputs**-0.5), numbers(outputs, RANK, scale=0.1 * RANK**-0.5)
        return found

    @cached_property
    def inputs(self) -> tuple[Array, Array, Array]:
        """x (1, S, D), adaln (1, adaln) and the gradient of the output (1, S, D)."""
        numbers, S, D = Numbers.seeded(10), self.tokens, self.config.dim
        return numbers(1, S, D), numbers(1, self.config.adaln_dim, scale=0.5), numbers(1, S, D)

    @cached_property
    def angles(self) -> Array:
        """(1, S, K / 2) float32."""
        ids = np.concatenate([image_ids(self.rows, self.rows, _CAPTION), caption_ids(_CAPTION)])
        return rope_angles(ids, self.config)[None]

    def reference(self) -> tuple[reference_transformer.Block, Array]:
        """The block of NumPy, with the LoRAs in its weights, and its rotation."""
        merged = dict(self.weights)
        for name, (A, B) in self.loras.items():
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + B @ A
        return reference_transformer.Block(for_numpy(merged), self.config), np.exp(1j * self.angles)

    def device(self, dtype: str) -> tuple[transformer.Block, BlockContext, Sequence[mx.array]]:
        """The block of the device, with LoRAs beside its layers, what it takes beside x, and its inputs."""
        block = filled(transformer.Block(self.config), self.weights, dtype)
        assert isinstance(block, transformer.Block)
        add_trainable_loras(block, LORA_LAYERS, RANK, float(RANK), np.random.default_rng(0))
        place(block, {
            f"{name}.lora_{letter}": mx.array(factor)
            for name, pair in self.loras.items() for letter, factor in zip("AB", pair, strict=True)
        })  # fmt: skip
        inputs = [mx.array(array).astype(stream_dtype(DTYPES[dtype])) for array in self.inputs]
        return block, BlockContext(rotation_tables(mx.array(self.angles)), None, inputs[1]), inputs


def block(size: Size) -> Trial:
    """The output of a block, less its input: the input would hide errors."""
    trial = BlockTrial(*size)
    x, adaln, _ = trial.inputs

    def expected() -> list[Array]:
        reference, turn = trial.reference()
        return [reference(x, turn, None, adaln) - x]

    def actual(dtype: str) -> list[mx.array]:
        module, context, inputs = trial.device(dtype)
        return [BlockRunner()(module, inputs[0], *context).astype(mx.float32) - mx.array(x)]

    return Trial(expected, actual)


def gradient(size: Size) -> Trial:
    """The gradients of a block's input and of its LoRAs."""
    trial = BlockTrial(*size)
    x, adaln, d_out = trial.inputs

    def expected() -> list[Array]:
        reference, turn = trial.reference()
        d_x, layers = block_gradient(reference, x, turn, adaln, d_out)
        found = [d_x]
        for name, (A, B) in trial.loras.items():
            inner, d = (array.reshape(-1, array.shape[-1]) for array in layers[name])
            found += [(d @ B).T @ inner, d.T @ (inner @ A.T)]
        return found

    def actual(dtype: str) -> list[mx.array]:
        module, context, inputs = trial.device(dtype)
        run_forward, run_backward = (PerBlock(forward), PerBlock(backward)) if on_gpu() else (forward, backward)
        kept = run_forward(module, inputs[0], context)[1]
        d_x, _, found = run_backward(module, kept, context, inputs[2])
        return [d_x, *(found[f"{name}.lora_{letter}"] for name in trial.loras for letter in "AB")]

    return Trial(expected, actual)


def encoder_layer(size: Size) -> Trial:
    """A layer of the text encoder on (tokens, width), less its input."""
    tokens, heads = size
    config = encoder_config(heads)
    prefix, numbers = "model.layers.0.", Numbers.seeded(11)
    shapes = parameters.text_encoder_parameters(config)
    weights = numbers.weights({n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)})
    x = numbers(tokens, config.hidden_size)

    def expected() -> list[Array]:
        return [reference_encoder.Layer(for_numpy(weights), config)(x) - x]

    def actual(dtype: str) -> list[mx.array]:
        layer = filled(text_encoder.Layer(config), weights, dtype)
        return [layer(on_device(x, dtype)[None])[0].astype(mx.float32) - mx.array(x)]

    return Trial(expected, actual)


def encoder_config(heads: int) -> TextEncoderConfig:
    """The official one with `heads` heads, all widths in proportion."""
    official = OFFICIAL_TEXT_ENCODER
    part = heads / official.num_attention_heads
    return replace(
        official, vocab_size=64, hidden_size=round(part * official.hidden_size), num_attention_heads=heads,
        intermediate_size=round(part * official.intermediate_size), num_key_value_heads=heads // 4,
    )  # fmt: skip
