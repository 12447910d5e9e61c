"""How other programs name and lay out the same weights, and the way there and back.

    diffusers   the official names: `model.parameters`
    comfy       ComfyUI's single file: q, k and v are one matrix, no patch size in the names
    ldm         the autoencoder as CompVis named it: up blocks counted from the other end, attention as 1x1 convolutions
    burn        the original Rust tool: comfy or LDM names, Linear weights (in, out), gamma and beta for norms
    llama.cpp   Qwen3 in GGUF files; its converter leaves the rows of q and k in place, unlike Llama's

A dialect is one function: from an official name to the place where the dialect keeps it. Both directions follow.
Sources: diffusers' single_file_utils.py (convert_z_image_transformer_checkpoint_to_diffusers,
convert_ldm_vae_checkpoint), burn's nn modules, gguf-py's tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zimage_ref.formats.tensors import Array, Tensor, Tensors
from zimage_ref.model.config import VAEConfig
from zimage_ref.model.parameters import Shapes

_LINEAR_RANK = 2


@dataclass(frozen=True)
class Home:
    """Where and how a dialect keeps one official tensor."""

    name: str
    part: int = 0  # which block of rows of a fused matrix it is,
    parts: int = 1  # of how many, all of one size
    transposed: bool = False  # stored as (in, out)
    spatial: bool = False  # a matrix as a 1x1 convolution, (out, in, 1, 1)

    @property
    def same(self) -> bool:
        """Whether the data is the official tensor's."""
        return self == Home(self.name)

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the dialect of an official tensor of `shape`, or of `parts` of them fused."""
        rows = (shape[0] * self.parts, *shape[1:]) if self.parts > 1 else shape
        return rows[::-1] if self.transposed else (*rows, 1, 1) if self.spatial else rows

    def official(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The inverse of `stored`."""
        rows = stored[::-1] if self.transposed else stored[:2] if self.spatial else stored
        return (rows[0] // self.parts, *rows[1:]) if self.parts > 1 else rows


# each tensor of a file, and the official tensors it holds
Layout = Mapping[str, Sequence[tuple[str, Home]]]


@dataclass(frozen=True)
class Dialect:
    """One way to name and lay out one component's weights."""

    name: str
    component: str
    home: Callable[[str, tuple[int, ...], Any], Home]  # official name, its shape, the component's config

    def layout(self, shapes: Shapes, config: Any) -> Layout:
        """The file in this dialect of a model with parameters `shapes`."""
        layout: dict[str, list[tuple[str, Home]]] = {}
        for name, shape in shapes.items():
            home = self.home(name, shape, config)
            layout.setdefault(home.name, []).append((name, home))
        return layout

    def write(self, tensors: Tensors, config: Any) -> dict[str, Tensor]:
        """Official tensors as this dialect has them: a whole model's, or some, with all parts of each fused matrix."""
        layout = self.layout({name: tensor.shape for name, tensor in tensors.items()}, config)
        return {name: _joined([(tensors[part], home) for part, home in group]) for name, group in layout.items()}


def taken(stored: Tensor, home: Home, shape: tuple[int, ...]) -> Tensor:
    """The official tensor of `shape` that `stored` holds."""
    if home.same:
        return stored

    def take(array: Array) -> Array:
        rows = array.T if home.transposed else array
        return rows[home.part * shape[0] : (home.part + 1) * shape[0]].reshape(shape)

    return stored.view(shape, take)


def _joined(parts: Sequence[tuple[Tensor, Home]]) -> Tensor:
    first, home = parts[0]
    if home.same:
        return first
    ordered = [tensor for tensor, _ in sorted(parts, key=lambda part: part[1].part)]

    def join() -> Array:
        rows = np.concatenate([t.read() for t in ordered]) if len(ordered) > 1 else ordered[0].read()
        return rows.T if home.transposed else rows.reshape(home.stored(first.shape))

    return Tensor(home.stored(first.shape), first.dtype, join)


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def _official(name: str, shape: tuple[int, ...], config: Any) -> Home:
    return Home(name)


_COMFY = {
    r"^all_(x_embedder|final_layer)\.\d+-\d+\.": r"\1.",
    r"\.attention\.to_out\.0\.": ".attention.out.",
    r"\.attention\.norm_([qk])\.": r".attention.\1_norm.",
}
_QKV = re.compile(r"\.attention\.to_([qkv])\.")


def _transformer_comfy(name: str, shape: tuple[int, ...], config: Any) -> Home:
    name = _renamed(name, _COMFY)
    fused = _QKV.search(name)
    if fused:
        return Home(_QKV.sub(".attention.qkv.", name), "qkv".index(fused[1]), 3)
    return Home(name)


_TRANSFORMER_BURN = {
    r"\.attention\.out\.": ".attention.to_out.",
    r"\badaLN_modulation\.\d\.": "adaln_modulation.",
    r"^cap_embedder\.0\.weight$": "cap_embedder_0.gamma",
    r"^cap_embedder\.1\.": "cap_embedder_1.",
    r"^t_embedder\.mlp\.0\.": "t_embedder.mlp_1.",
    r"^t_embedder\.mlp\.2\.": "t_embedder.mlp_2.",
    r"(norm[12]?)\.weight$": r"\1.gamma",
}


def _transformer_burn(name: str, shape: tuple[int, ...], config: Any) -> Home:
    home = _transformer_comfy(name, shape, config)
    linear = len(shape) == _LINEAR_RANK and name.endswith(".weight")
    return replace(home, name=_renamed(home.name, _TRANSFORMER_BURN), transposed=linear)


def _transformer_burn_oldest(name: str, shape: tuple[int, ...], config: Any) -> Home:
    home = _transformer_burn(name, shape, config)
    key = re.match(r"all_(?:x_embedder|final_layer)\.(\d+)-(\d+)\.", name)
    if key is None:
        return home
    return replace(home, name=re.sub(r"^(\w+)\.", rf"all_\1.r{key[1]}_{key[2]}.", home.name))


def _text_hf(name: str, shape: tuple[int, ...], config: Any) -> Home:
    return Home(name.removeprefix("model."))


def _text_burn(name: str, shape: tuple[int, ...], config: Any) -> Home:
    linear = len(shape) == _LINEAR_RANK and "embed_tokens" not in name
    return Home(re.sub(r"norm\.weight$", "norm.gamma", name.removeprefix("model.")), transposed=linear)


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


def _text_llama_cpp(name: str, shape: tuple[int, ...], config: Any) -> Home:
    return Home(_renamed(name, _LLAMA_CPP))


_LDM = {
    r"\.(down|up)_blocks\.(\d+)\.resnets\.": r".\1.\2.block.",
    r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv\.": r".\1.\2.\3sample.conv.",
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.group_norm\.": ".mid.attn_1.norm.",
    r"\.mid_block\.attentions\.0\.to_([qkv])\.": r".mid.attn_1.\1.",
    r"\.mid_block\.attentions\.0\.to_out\.0\.": ".mid.attn_1.proj_out.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"\.conv_norm_out\.": ".norm_out.",
}


def _vae_ldm(name: str, shape: tuple[int, ...], config: VAEConfig) -> Home:
    last = len(config.block_out_channels) - 1
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda up: f".up_blocks.{last - int(up[1])}.", name)
    return Home(_renamed(name, _LDM), spatial=len(shape) == _LINEAR_RANK)


_VAE_BURN = {
    r"\.mid\.": ".mid_",
    r"(norm|norm1|norm2|norm_out)\.weight$": r"\1.gamma",
    r"(norm|norm1|norm2|norm_out)\.bias$": r"\1.beta",
}


def _vae_burn(name: str, shape: tuple[int, ...], config: VAEConfig) -> Home:
    home = _vae_ldm(name, shape, config)
    return replace(home, name=_renamed(home.name, _VAE_BURN))


_BY_COMPONENT: dict[str, dict[str, Callable[[str, tuple[int, ...], Any], Home]]] = {
    "transformer": {
        "diffusers": _official, "comfy": _transformer_comfy, "burn": _transformer_burn,
        "burn of 2025": _transformer_burn_oldest,
    },
    "text_encoder": {"hf": _text_hf, "burn": _text_burn, "llama.cpp": _text_llama_cpp},
    "vae": {"diffusers": _official, "ldm": _vae_ldm, "burn": _vae_burn},
}  # fmt: skip
DIALECTS = {
    component: {name: Dialect(name, component, home) for name, home in dialects.items()}
    for component, dialects in _BY_COMPONENT.items()
}
OFFICIAL = {component: Dialect("diffusers", component, _official) for component in DIALECTS}

# component -> value of `naming` -> the dialect that is written
NAMINGS = {
    "transformer": {"diffusers": OFFICIAL["transformer"], "comfy": DIALECTS["transformer"]["comfy"]},
    "text_encoder": {"diffusers": OFFICIAL["text_encoder"], "comfy": OFFICIAL["text_encoder"]},
    "vae": {
        "diffusers": OFFICIAL["vae"], "comfy": DIALECTS["vae"]["ldm"], "ldm": DIALECTS["vae"]["ldm"],
    },
}  # fmt: skip
