"""The grammar of LoRA keys: <prefix><module><suffix>, as trainers spell it.

    diffusion_model.layers.0.attention.to_q.lora_A.weight       ComfyUI, ai-toolkit, mflux
    transformer.layers.0.attention.to_q.lora_B.weight           diffusers
    lora_unet_layers_0_attention_to_q.lora_down.weight          kohya, musubi-tuner
    layers.0.attention.to_q.lora_A.default.weight               DiffSynth
    base_model.model.layers.0.attention.to_q.lora_A.weight      PEFT
    layers.0.attention.to.q.lora.down.weight                    Anime-Z
    layers.0.attention.qkv.lora_a                               z-image-train
    lycoris_layers_0_attention_to_q.lokr_w1                     LyCORIS

A module is called as in the official checkpoint, as in ComfyUI's single file (fused qkv, `out`), or either with
underscores for dots. Sources: the loaders of ComfyUI and diffusers, and the writers named above.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.",
    "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
SOFTWARE = {  # by prefix; by style where that is one tool's alone
    "base_model.model.": "PEFT", "model.diffusion_model.": "ComfyUI", "diffusion_model.": "ComfyUI",
    "transformer.": "diffusers", "lora_unet_": "kohya", "lora_transformer_": "kohya", "lycoris_": "LyCORIS", "": "bare",
    "lora_a/b": "z-image-train", "lora.down/up": "Anime-Z",
}  # fmt: skip

# suffix of a key -> (what it spells together with its fellows, which part of an update it is)
SUFFIXES = {
    **{f".lora_{x}{end}": ("lora_A/B", x) for x in "AB" for end in (".weight", "")},
    ".lora_magnitude_vector": ("lora_A/B", "magnitude"),
    ".lora_magnitude_vector.weight": ("lora_A/B", "magnitude"),
    ".lora_down.weight": ("lora_down/up", "A"),
    ".lora_up.weight": ("lora_down/up", "B"),
    ".lora.down.weight": ("lora.down/up", "A"),
    ".lora.up.weight": ("lora.down/up", "B"),
    ".lora_a": ("lora_a/b", "A"),
    ".lora_b": ("lora_a/b", "B"),
    **{f".lokr_w{n}": ("LoKr", f"W{n}") for n in "12"},
    **{f".lokr_w{n}_{x}": ("LoKr", f"W{n}{x}") for n in "12" for x in "ab"},
    **{f".hada_w{n}_{x}": ("LoHa", f"H{n}{x}") for n in "12" for x in "ab"},
    ".dora_scale": ("", "magnitude"),
    ".diff": ("diff", "D"),
    ".diff_b": ("diff", "bias"),
    ".alpha": ("", "alpha"),
}
_SPLIT = re.compile(f"(.*?)({'|'.join(re.escape(s) for s in sorted(SUFFIXES, key=len, reverse=True))})")
_ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.(?!weight$)\w+(\.weight)?$")  # PEFT's name of the adapter

_BLOCK_MODULES: dict[str, tuple[str, ...]] = {
    **{f"attention.to_{p}": (f"attention.to_{p}",) for p in ("q", "k", "v", "out.0")},
    **{f"attention.to.{p}": (f"attention.to_{p}",) for p in "qkv"},
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    **dict.fromkeys(("attention.out", "attention.to_out", "attention.to.out.0"), ("attention.to_out.0",)),
    **{f"feed_forward.{w}": (f"feed_forward.{w}",) for w in ("w1", "w2", "w3")},
    "adaLN_modulation.0": ("adaLN_modulation.0",),
    **{f"attention.norm_{p}": (f"attention.norm_{p}",) for p in "qk"},
    **{f"attention.{p}_norm": (f"attention.norm_{p}",) for p in "qk"},
    **{norm: (norm,) for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
}
_GLOBAL_MODULES = {
    **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
    "x_embedder": "all_x_embedder.{key}",
    "final_layer.linear": "all_final_layer.{key}.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.{key}.adaLN_modulation.1",
}
_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)[._](\d+)[._](.+)")
_KEYED = re.compile(r"(all_x_embedder|all_final_layer)[._](\d+-\d+)(?:[._](.+))?")
_UNDERSCORED = {name.replace(".", "_"): name for name in reversed((*_BLOCK_MODULES, *_GLOBAL_MODULES))}
OFFICIAL_PATCH_KEY = "2-1"


@dataclass(frozen=True)
class Key:
    """One key, taken apart."""

    prefix: str
    module: str  # with dots, as the file's tree calls it
    layers: tuple[str, ...]  # official names: three for a fused qkv, else one
    style: str
    part: str


def parse(key: str, patch_key: str = OFFICIAL_PATCH_KEY) -> Key | None:
    """What `key` means, or None where this grammar has no such key."""
    match = _SPLIT.fullmatch(_ADAPTER.sub(r"\1\2", key))
    if not match:
        return None
    path, suffix = match.groups()
    prefix = next((p for p in PREFIXES if path.startswith(p)), "")
    found = _module(path.removeprefix(prefix), patch_key)
    return Key(prefix, *found, *SUFFIXES[suffix]) if found else None


def _module(path: str, patch_key: str) -> tuple[str, tuple[str, ...]] | None:
    """The dotted name of a module and the official names of the layers it stands for."""
    if block := _BLOCK.fullmatch(path):
        stack, index, rest = block.groups()
        rest = _UNDERSCORED.get(rest, rest)
        layers = tuple(f"{stack}.{index}.{layer}" for layer in _BLOCK_MODULES.get(rest, ()))
        return (f"{stack}.{index}.{rest}", layers) if layers else None
    if keyed := _KEYED.fullmatch(path):
        stack, patch, rest = keyed.groups()
        short = ".".join(filter(None, (stack.removeprefix("all_"), rest)))
        short = _UNDERSCORED.get(short.replace(".", "_"), short)
        layer = _GLOBAL_MODULES.get(short)
        return (path, (layer.format(key=patch),)) if layer else None
    path = _UNDERSCORED.get(path, path)
    layer = _GLOBAL_MODULES.get(path)
    return (path, (layer.format(key=patch_key),)) if layer else None


# words of a foreign module path -> the model it belongs to
_OTHERS = {
    "double_blocks": "FLUX or HunyuanVideo", "single_blocks": "FLUX or HunyuanVideo", "lora_te": "a text encoder",
    "text_encoder": "a text encoder", "text_model": "a text encoder", "single_transformer_blocks": "FLUX",
    "joint_blocks": "Stable Diffusion 3", "down_blocks": "Stable Diffusion", "up_blocks": "Stable Diffusion",
    "mid_block": "Stable Diffusion", "input_blocks": "Stable Diffusion", "output_blocks": "Stable Diffusion",
    "transformer_blocks": "FLUX, Qwen-Image or Stable Diffusion 3", "cross_attn": "Wan",
    "self_attn": "a language model",
}  # fmt: skip


def other_model(key: str) -> str:
    """The model that a key of no Z-Image layer seems to belong to, or nothing."""
    return next((model for word, model in _OTHERS.items() if word in key), "")


def is_lora(keys: Iterable[str]) -> bool:
    """Whether any of the keys ends as LoRA keys do, be it of a layer that Z-Image has or not."""
    return any(_SPLIT.fullmatch(_ADAPTER.sub(r"\1\2", key)) for key in keys)
