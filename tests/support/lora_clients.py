"""How other programs read LoRA files: the keys that each looks for, and whether it takes alpha. Facts of their loaders.

A client here reads the tensors of a file as its program does, and says what it adds to each layer and which keys it
leaves. Nothing here imports the product. Sources: ComfyUI 0.33 comfy/lora.py; mflux 0.24 z_image_lora_mapping.py;
diffusers 0.42 lora_conversion_utils.py; DiffSynth-Studio utils/lora/general.py; InvokeAI
z_image_lora_conversion_utils.py; musubi-tuner convert_lora.py and utils/lora_utils.py; stable-diffusion.cpp
name_conversion.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

Tensors = Mapping[str, np.ndarray]
AB = ((".lora_A.weight", ".lora_B.weight"),)
DOWN_UP = ((".lora_down.weight", ".lora_up.weight"),)
DEFAULT = ((".lora_A.default.weight", ".lora_B.default.weight"),)
NORMS = {"attention.norm_q": "attention.q_norm", "attention.norm_k": "attention.k_norm"}


def same(layer: str) -> str:
    return layer


def flat(layer: str) -> str:
    return layer.replace(".", "_")


def in_comfyui(layer: str) -> str:
    """The name in ComfyUI's single file; q, k and v are one matrix there and have no names of their own."""
    for official, own in {**NORMS, "attention.to_out.0": "attention.out"}.items():
        layer = layer.replace(official, own)
    return "" if re.search(r"\.to_[qkv]$", layer) else re.sub(r"^all_(x_embedder|final_layer)\.2-1", r"\1", layer)


def flat_in_comfyui(layer: str) -> str:
    return flat(in_comfyui(layer))


def invoke_kohya(layer: str) -> str:
    return flat(layer) if re.search(r"\.(to_[qkv]|w[123])$", layer) else ""


@dataclass(frozen=True)
class Client:
    """names: prefix and spelling of a module, as often as the program has them."""

    name: str
    names: tuple[tuple[str, Callable[[str], str]], ...]
    pairs: tuple[tuple[str, str], ...]
    diffs: tuple[tuple[str, Callable[[str], str]], ...] = ()  # the names below which it finds .diff and .diff_b
    alpha: bool = True
    metadata: bool = False  # whether it takes lora_alpha of the metadata

    def read(
        self, tensors: Tensors, metadata: Mapping[str, str], layers: Iterable[str]
    ) -> tuple[dict[str, np.ndarray], set[str]]:
        """What is added to each layer (or layer + ".bias"), and the keys that are left."""
        added: dict[str, np.ndarray] = {}
        left = set(tensors)
        for layer in layers:
            for prefix, spell in self.names:
                for down, up in self.pairs:
                    name = prefix + spell(layer)
                    if spell(layer) and name + down in left:
                        A, B = tensors[name + down], tensors[name + up]
                        scale = self._scale(tensors, metadata, name, layer, len(A))
                        added[layer] = scale * B.astype(np.float64) @ A.astype(np.float64)
                        left -= {name + down, name + up, name + ".alpha" if self.alpha else ""}
            for prefix, spell in self.diffs:
                for suffix, kind in ((".diff", ""), (".diff_b", ".bias")):
                    name = f"{prefix}{spell(layer)}{suffix}"
                    if spell(layer) and name in left:
                        added[layer + kind] = tensors[name]
                        left.discard(name)
        return added, left

    def _scale(self, tensors: Tensors, metadata: Mapping[str, str], name: str, layer: str, rank: int) -> float:
        if self.alpha and name + ".alpha" in tensors:
            return float(tensors[name + ".alpha"]) / rank
        if self.metadata and name.startswith("transformer.") and "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
            patterns = config["transformer.alpha_pattern"]
            return float(patterns.get(layer, config["transformer.lora_alpha"])) / rank
        return 1.0


_PREFIXES = (("diffusion_model.", same), ("transformer.", same), ("", same))
_COMFYUI = (*_PREFIXES, ("lycoris_", flat), ("diffusion_model.", in_comfyui), ("lora_unet_", flat_in_comfyui))
CLIENTS = {
    client.name: client
    for client in (
        Client("ComfyUI", _COMFYUI, AB + DOWN_UP + DEFAULT, diffs=_COMFYUI),
        Client(
            "mflux", (*_PREFIXES, ("lora_unet_", flat)), AB + DOWN_UP + DEFAULT, metadata=True,
            diffs=(("diffusion_model.", lambda layer: in_comfyui(layer) if "norm" in layer else ""),
                   ("diffusion_model.", lambda layer: layer if layer.endswith("adaLN_modulation.0") else "")),
        ),
        Client("diffusers", (*_PREFIXES, ("lora_unet_", flat)), AB + DOWN_UP + DEFAULT, metadata=True),
        Client(
            "InvokeAI", (*_PREFIXES[:2], ("base_model.model.transformer.", same), ("lora_unet__", invoke_kohya)),
            AB + DOWN_UP,
        ),
        Client("DiffSynth-Studio", (("diffusion_model.", same), ("", same)), AB + DOWN_UP + DEFAULT),
        Client("musubi-tuner", (*_PREFIXES[:2], ("lora_unet_", flat)), AB + DOWN_UP),
        Client("ai-toolkit", (("diffusion_model.", same),), AB, alpha=False),
        Client("stable-diffusion.cpp", _PREFIXES, AB + DOWN_UP + DEFAULT, diffs=_PREFIXES),
    )
}  # fmt: skip
