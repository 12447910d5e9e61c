"""The text encoder, Qwen3: its dialects and its Component.

    hf          the official names, with or without `model.` before them
    burn        the original Rust tool: Linear weights (in, out), gamma for norms
    llama.cpp   GGUF files; the rows of q and k keep their order (the converter permutes them for Llama only)

Sources: transformers' modeling_qwen3.py; burn's nn modules; gguf-py's tensor_mapping.py.
"""

from __future__ import annotations

import re
from dataclasses import replace

from zimage_ref.formats.tensors import Tensors
from zimage_ref.model.config import OFFICIAL_TEXT_ENCODER, TextEncoderConfig
from zimage_ref.model.parameters import text_encoder_parameters, text_encoder_unused

from .component import Component, count_numbered
from .dialects import LINEAR_RANK, OFFICIAL, Dialect, Placement, Shape, renamed
from .mflux import MFLUX_FILES

_LLAMA_CPP = {
    r"^model\.embed_tokens\.": "token_embd.",
    r"^model\.norm\.": "output_norm.",
    r"^model\.layers\.": "blk.",
    r"\.self_attn\.([qkv])_proj\.": r".attn_\1.",
    r"\.self_attn\.o_proj\.": ".attn_output.",
    r"\.self_attn\.([qk])_norm\.": r".attn_\1_norm.",
    r"\.mlp\.(gate|up|down)_proj\.": r".ffn_\1.",
    r"\.input_layernorm\.": ".attn_norm.",
    r"\.post_attention_layernorm\.": ".ffn_norm.",
}


def _hf(name: str, shape: Shape, config: object) -> Placement:
    return Placement(name.removeprefix("model."))


def _burn(name: str, shape: Shape, config: object) -> Placement:
    linear = len(shape) == LINEAR_RANK and "embed_tokens" not in name
    return Placement(re.sub(r"norm\.weight$", "norm.gamma", name.removeprefix("model.")), transposed=linear)


def _llama_cpp(name: str, shape: Shape, config: object) -> Placement:
    return Placement(renamed(name, _LLAMA_CPP))


def _sizes(dialect: Dialect[TextEncoderConfig], tensors: Tensors) -> TextEncoderConfig:
    layers = count_numbered(tensors, r"(?:layers|blk)\.(\d{1,4})\.", OFFICIAL_TEXT_ENCODER.num_hidden_layers)
    counted = replace(OFFICIAL_TEXT_ENCODER, num_hidden_layers=layers)
    layer = "model.layers.0"
    vocabulary, hidden = dialect.official_shape(tensors, "model.embed_tokens.weight", 2, counted)
    (head,) = dialect.official_shape(tensors, f"{layer}.self_attn.q_norm.weight", 1, counted)
    queries, _ = dialect.official_shape(tensors, f"{layer}.self_attn.q_proj.weight", 2, counted)
    keys, _ = dialect.official_shape(tensors, f"{layer}.self_attn.k_proj.weight", 2, counted)
    ffn, _ = dialect.official_shape(tensors, f"{layer}.mlp.gate_proj.weight", 2, counted)
    return replace(
        counted,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        head_dim=head,
        num_attention_heads=queries // head,
        num_key_value_heads=keys // head,
    )


TEXT_ENCODER = Component(
    name="text_encoder",
    title="text encoder",
    family="Qwen3",
    official=OFFICIAL_TEXT_ENCODER,
    config_key="head_dim",
    parameters=text_encoder_parameters,
    unused=text_encoder_unused,
    sizes=_sizes,
    dialects=(Dialect("hf", _hf, whole=True), Dialect("burn", _burn), Dialect("llama.cpp", _llama_cpp)),
    namings={"diffusers": OFFICIAL, "comfy": OFFICIAL, "mflux": Dialect("mflux", _hf, whole=True, files=MFLUX_FILES)},
    prefixes=("text_encoders.qwen3_4b.transformer.model.", "text_encoders.qwen3_4b.transformer.", "model."),
    ignored=("lm_head.weight", "output.weight", "rope_freqs.weight", "rotary_emb.inv_freq"),  # copies, and two tables
    stem="model",
    library=("transformers", "Qwen3Model"),
    flat_stems=("qwen3_4b_text_encoder", "qwen_3_4b"),
    comfy_folders=("text_encoders", "clip"),
    model_types=("text-encoder", "te"),
)
