"""The grammar of LoRA keys, <prefix><module><suffix>. Spellings and kinds list the prefixes, modules and suffixes.

A module has its name in the official checkpoint or its name in ComfyUI's single file (fused qkv, `out`). Either may
have underscores instead of dots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array
from zimage_ref.model.parameters import BLOCK_MODULES

from .alpha import AlphaSource
from .updates import LoRA, Update

OFFICIAL_PATCH_KEY = "2-1"
_ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.(?!weight$)\w+(\.weight)?$")  # PEFT's adapter name
_GLOBAL_MODULES = {
    **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
    "x_embedder": "all_x_embedder.{key}",
    "final_layer.linear": "all_final_layer.{key}.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.{key}.adaLN_modulation.1",
}
_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)[._](\d+)[._](.+)")
_KEYED = re.compile(r"(all_x_embedder|all_final_layer)[._](\d+-\d+)(?:[._](.+))?")

Spelled = tuple[dict[str, Array], dict[str, object]]  # float32 arrays by key; facts for metadata and sidecar


def _only_read(lora: LoRA, spelling: Spelling) -> Spelled:
    raise ConfigError(f"LoRA keys of {spelling.software} can be read, but not written")


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How one tool writes LoRA keys. Modules and suffixes that it does not list are those of the checkpoint or kind."""

    software: str
    prefixes: tuple[str, ...] = ()  # all of these are read, the first is written
    style: str = ""  # the name of the suffixes below, in the name of a dialect
    suffixes: Mapping[str, str] = field(default_factory=dict)  # suffix -> part; the first suffix of a part is written
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a module of a block -> its official layers
    separator: str = "."  # written instead of the dots of a module; reading accepts "." and "_"
    alpha: AlphaSource | None = None  # the place of the alpha of files without alpha keys
    naming: str = ""  # the name that a user gives to have it written; empty: it is only read
    write: Callable[[LoRA, Spelling], Spelled] = _only_read  # a function of `namings`, or its own
    low_rank_only: bool = False  # whether `write` has no keys for other kinds

    def is_of(self, prefix: str, style: str) -> bool:
        """Whether keys with this prefix and style are of this tool. If it has no own style, the prefix decides."""
        return style == self.style if self.style else prefix in self.prefixes


@dataclass(frozen=True)
class Key:
    """One key, split into its parts."""

    prefix: str
    module: str  # its name in the file, with dots
    layers: tuple[str, ...]  # official names: three for a fused qkv, else one
    style: str
    part: str


class Grammar:
    """All valid keys, for a transformer whose patch size has the key `patch_key`."""

    def __init__(
        self, spellings: Collection[Spelling], kinds: Iterable[type[Update]], patch_key: str = OFFICIAL_PATCH_KEY
    ) -> None:
        self._patch_key = patch_key
        prefixes = {prefix for spelling in spellings for prefix in spelling.prefixes}
        self._prefixes = sorted(prefixes, key=len, reverse=True)
        self._suffixes = {".alpha": ("", "alpha")}
        self._block_modules: dict[str, tuple[str, ...]] = {name: (name,) for name in BLOCK_MODULES}
        for kind in kinds:
            self._suffixes |= {suffix: (kind.style, part) for suffix, part in kind.suffixes.items()}
        for spelling in spellings:
            self._suffixes |= {suffix: (spelling.style, part) for suffix, part in spelling.suffixes.items()}
            self._block_modules = {**spelling.modules, **self._block_modules}
        known = "|".join(re.escape(suffix) for suffix in sorted(self._suffixes, key=len, reverse=True))
        self._split = re.compile(f"(.*?)({known})")
        names = (*self._block_modules, *_GLOBAL_MODULES)  # official names are last, to replace equal ones
        self._underscored = {name.replace(".", "_"): name for name in names}

    def parse(self, key: str) -> Key | None:
        """The meaning of `key`. None if it is not a key of a Z-Image LoRA."""
        match = self._match(key)
        if not match:
            return None
        path, suffix = match.groups()
        prefix = next((p for p in self._prefixes if path.startswith(p)), "")
        found = self._module(path.removeprefix(prefix))
        return Key(prefix, *found, *self._suffixes[suffix]) if found else None

    def ends_like_lora(self, key: str) -> bool:
        """Whether `key` ends like the key of a LoRA, of Z-Image or of another model."""
        return self._match(key) is not None

    def _match(self, key: str) -> re.Match[str] | None:
        return self._split.fullmatch(_ADAPTER.sub(r"\1\2", key))

    def _module(self, path: str) -> tuple[str, tuple[str, ...]] | None:
        """The dotted name of a module, and the official names of the layers that it holds. None if it is unknown."""
        if block := _BLOCK.fullmatch(path):
            stack, index, rest = block.groups()
            rest = self._underscored.get(rest, rest)
            layers = tuple(f"{stack}.{index}.{layer}" for layer in self._block_modules.get(rest, ()))
            return (f"{stack}.{index}.{rest}", layers) if layers else None
        if keyed := _KEYED.fullmatch(path):
            stack, patch, rest = keyed.groups()
            short = ".".join(filter(None, (stack.removeprefix("all_"), rest)))
            short = self._underscored.get(short.replace(".", "_"), short)
            layer = _GLOBAL_MODULES.get(short)
            return (path, (layer.format(key=patch),)) if layer else None
        path = self._underscored.get(path, path)
        layer = _GLOBAL_MODULES.get(path)
        return (path, (layer.format(key=self._patch_key),)) if layer else None


# part of a module path of another model -> that model
_OTHERS = {
    "double_blocks": "FLUX or HunyuanVideo", "single_blocks": "FLUX or HunyuanVideo", "lora_te": "a text encoder",
    "text_encoder": "a text encoder", "text_model": "a text encoder", "single_transformer_blocks": "FLUX",
    "joint_blocks": "Stable Diffusion 3", "down_blocks": "Stable Diffusion", "up_blocks": "Stable Diffusion",
    "mid_block": "Stable Diffusion", "input_blocks": "Stable Diffusion", "output_blocks": "Stable Diffusion",
    "transformer_blocks": "FLUX, Qwen-Image or Stable Diffusion 3", "cross_attn": "Wan",
    "self_attn": "a language model",
}  # fmt: skip


def other_model(key: str) -> str:
    """The other model that `key` seems to belong to; "" if no model is known."""
    return next((model for word, model in _OTHERS.items() if word in key), "")
