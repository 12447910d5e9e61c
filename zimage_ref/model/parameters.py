"""Names and shapes of the parameters of the three networks, as the official checkpoints spell them.

A tensor that is not in these tables is an error. Shapes are PyTorch's: Linear (out, in), Conv2d (out, in, kh, kw).
Source: the published index files. tests/model/test_parameters.py checks counts and totals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

from zimage_ref.errors import ConfigError

from .config import (
    OFFICIAL_TEXT_ENCODER,
    OFFICIAL_TRANSFORMER,
    TIME_FREQUENCIES,
    TIME_HIDDEN_DIM,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
)

Shapes = dict[str, tuple[int, ...]]

# The large Linear layers of a block by the LoRA target that selects them. They have no bias
LORA_TARGETS = {
    "attention": ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    "feed_forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
}
_ADALN = "adaLN_modulation.0"
TARGETS = (*LORA_TARGETS, "refiners", "adaln", "all")


def transformer_parameters(config: TransformerConfig) -> Shapes:
    """Every parameter of the diffusion transformer: 521 at full size."""
    dim, adaln, key = config.dim, config.adaln_dim, config.patch_key
    shapes: Shapes = {
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        **linear(f"all_x_embedder.{key}", config.patch_dim, dim),
        **linear(f"all_final_layer.{key}.linear", dim, config.patch_dim),
        **linear(f"all_final_layer.{key}.adaLN_modulation.1", adaln, dim),
        **linear("t_embedder.mlp.0", TIME_FREQUENCIES, TIME_HIDDEN_DIM),
        **linear("t_embedder.mlp.2", TIME_HIDDEN_DIM, adaln),
        "cap_embedder.0.weight": (config.cap_feat_dim,),
        **linear("cap_embedder.1", config.cap_feat_dim, dim),
    }
    for block in transformer_blocks(config):
        modulated = not block.startswith("context_refiner")
        shapes.update({f"{block}.{name}": shape for name, shape in block_parameters(config, modulated).items()})
    return shapes


def has_bias(layer: str) -> bool:
    """Whether the layer with this official name has a bias, in a transformer of any size."""
    return _without_numbers(layer) in _layers_with_bias()


@cache
def _layers_with_bias() -> frozenset[str]:
    names = transformer_parameters(OFFICIAL_TRANSFORMER)
    return frozenset(_without_numbers(name.removesuffix(".bias")) for name in names if name.endswith(".bias"))


def _without_numbers(layer: str) -> str:
    """The name without the number of the block and the key of the patch size."""
    return re.sub(r"^(layers|noise_refiner|context_refiner|all_x_embedder|all_final_layer)\.[\d-]+", r"\1", layer)


def transformer_blocks(config: TransformerConfig) -> Iterator[str]:
    """Names of all blocks in the order they run."""
    for i in range(config.n_refiner_layers):
        yield f"noise_refiner.{i}"
    for i in range(config.n_refiner_layers):
        yield f"context_refiner.{i}"
    for i in range(config.n_layers):
        yield f"layers.{i}"


def block_parameters(config: TransformerConfig, modulated: bool) -> Shapes:
    """The parameters of one block, without its name; `modulated` by the time or not."""
    dim, ffn = config.dim, config.ffn_dim
    norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    w1, w2, w3 = LORA_TARGETS["feed_forward"]
    return {
        **{f"{name}.weight": (dim, dim) for name in LORA_TARGETS["attention"]},
        "attention.norm_q.weight": (config.head_dim,),
        "attention.norm_k.weight": (config.head_dim,),
        **{f"{name}.weight": (dim,) for name in norms},
        f"{w1}.weight": (ffn, dim),
        f"{w2}.weight": (dim, ffn),
        f"{w3}.weight": (ffn, dim),
        **(linear(_ADALN, config.adaln_dim, 4 * dim) if modulated else {}),
    }


def text_encoder_parameters(config: TextEncoderConfig) -> Shapes:
    """Every parameter of the official text encoder file: 398 at full size. See `text_encoder_unused`."""
    shapes: Shapes = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    layer = _text_layer(config)
    for i in range(config.num_hidden_layers):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    return shapes


def _text_layer(config: TextEncoderConfig) -> Shapes:
    hidden, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def text_encoder_unused(config: TextEncoderConfig) -> set[str]:
    """The parameters that the pipeline does not need, because hidden_states[-2] does not depend on them.

    They are those of the last layer and the final norm.
    """
    last = f"model.layers.{config.used_layers}."
    return {name for name in text_encoder_parameters(config) if name.startswith((last, "model.norm."))}


def vae_parameters(config: VAEConfig) -> Shapes:
    """Every parameter of the autoencoder: 244 at full size."""
    widths, latent = config.block_out_channels, config.latent_channels
    top, last = widths[-1], len(widths) - 1
    shapes: Shapes = {
        **_conv("encoder.conv_in", config.in_channels, widths[0]),
        **_mid("encoder.mid_block", top),
        **_norm("encoder.conv_norm_out", top),
        **_conv("encoder.conv_out", top, 2 * latent),  # mean and log-variance
        **_conv("decoder.conv_in", latent, top),
        **_mid("decoder.mid_block", top),
        **_norm("decoder.conv_norm_out", widths[0]),
        **_conv("decoder.conv_out", widths[0], config.in_channels),
    }
    previous = widths[0]
    for i, width in enumerate(widths):
        for j in range(config.layers_per_block):
            shapes |= _resnet(f"encoder.down_blocks.{i}.resnets.{j}", width if j else previous, width)
        if i < last:
            shapes |= _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width)
        previous = width
    for i, width in enumerate(reversed(widths)):
        for j in range(config.layers_per_block + 1):
            shapes |= _resnet(f"decoder.up_blocks.{i}.resnets.{j}", width if j else previous, width)
        if i < last:
            shapes |= _conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width)
        previous = width
    return shapes


def check_targets(targets: Sequence[str]) -> None:
    """Raises ConfigError unless all `targets` are in TARGETS."""
    for target in targets:
        if target not in TARGETS:
            raise ConfigError(f"`targets` {target!r} is unknown: known are {', '.join(TARGETS)}")


def lora_modules(config: TransformerConfig, targets: Sequence[str]) -> list[str]:
    """Names of the Linear layers that `targets` (any of TARGETS) select, in the order in which they run.

    `refiners` applies the other targets to the refiner blocks too; `all` selects every Linear layer of every block.
    Raises ConfigError for an unknown target, or when nothing is selected.
    """
    check_targets(targets)
    chosen = TARGETS if "all" in targets else targets
    suffixes = [suffix for target, known in LORA_TARGETS.items() if target in chosen for suffix in known]
    if "adaln" in chosen:
        suffixes.append(_ADALN)
    if not suffixes:
        raise ConfigError(f"LoRA targets {', '.join(targets)} select no layer: add attention, feed-forward or adaln")
    blocks = [b for b in transformer_blocks(config) if b.startswith("layers.") or "refiners" in chosen]
    known_layers = transformer_parameters(config)  # the context refiner has no modulation layer
    names = (f"{block}.{suffix}" for block in blocks for suffix in suffixes)
    return [name for name in names if f"{name}.weight" in known_layers]


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    """The parameters of the Linear layer `name`, which has a bias."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resnet(name: str, inputs: int, outputs: int) -> Shapes:
    return {
        **_norm(f"{name}.norm1", inputs),
        **_conv(f"{name}.conv1", inputs, outputs),
        **_norm(f"{name}.norm2", outputs),
        **_conv(f"{name}.conv2", outputs, outputs),
        **(_conv(f"{name}.conv_shortcut", inputs, outputs, kernel=1) if inputs != outputs else {}),
    }


def _mid(name: str, width: int) -> Shapes:
    attention = f"{name}.attentions.0"
    return {
        **_resnet(f"{name}.resnets.0", width, width),
        **_norm(f"{attention}.group_norm", width),
        **{
            k: v
            for p in ("to_q", "to_k", "to_v", "to_out.0")
            for k, v in linear(f"{attention}.{p}", width, width).items()
        },
        **_resnet(f"{name}.resnets.1", width, width),
    }


# Every module with parameters in a block of the transformer
BLOCK_MODULES = tuple(
    dict.fromkeys(name.rpartition(".")[0] for name in block_parameters(OFFICIAL_TRANSFORMER, modulated=True))
)

_LARGE_MATRICES = (
    *(
        f".{name}"
        for layer in (block_parameters(OFFICIAL_TRANSFORMER, modulated=False), _text_layer(OFFICIAL_TEXT_ENCODER))
        for name, shape in layer.items()
        if len(shape) == 2
    ),
    *(".before_proj.weight", ".after_proj.weight"),  # of a ControlNet
)


_BLOCK = re.compile(r"(?:model\.)?(?:layers|noise_refiner|context_refiner)\.\d+(?=\.)")
EMBEDDING = "model.embed_tokens.weight"  # of the text encoder: a prompt needs a few of its rows


def block_of(name: str) -> str:
    """The block of the transformer, or layer of the text encoder, that `name` belongs to; "" if there is none."""
    match = _BLOCK.match(name)
    return match[0] if match else ""


def is_large_matrix(name: str) -> bool:
    """Whether the parameter `name` is a large matrix in a block of the transformer or in a layer of the text encoder.

    Parameters of modulation, embedders, norms and the final layer are not.
    """
    return name.endswith(_LARGE_MATRICES)
