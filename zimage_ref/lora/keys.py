"""The grammar of LoRA keys: <wrappers and prefixes><module><suffix>, each from a small table.

    base_model.model.transformer.  layers.0.attention.to_q  .lora_A.default.weight
    lora_unet__                    layers_0_attention_to_q  .lora_down.weight
    pipe.dit.                      context.refiner.0...     .dora_scale

Spellings and kinds hold the tables. Every combination is read. A module has its name in the official checkpoint or its
name in ComfyUI's single file (fused qkv, `out`). Dots and underscores are the same in wrappers, prefixes and modules.
After a suffix may stand PEFT's name of the adapter, and `.weight`.
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
_GLOBAL_MODULES = {
    **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
    "x_embedder": "all_x_embedder.{key}",
    "final_layer.linear": "all_final_layer.{key}.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.{key}.adaLN_modulation.1",
    # The names of mflux
    "t_embedder.linear1": "t_embedder.mlp.0", "t_embedder.linear2": "t_embedder.mlp.2",
    "final_layer.adaLN_modulation.0": "all_final_layer.{key}.adaLN_modulation.1",
}  # fmt: skip
_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)_(\d+)_(.+)")
_KEYED = re.compile(r"all_(x_embedder|final_layer)_(\d+-\d+)(?:_(.+))?")
_TAIL = r"(?:\.(?!weight$|bias$)[\w-]+)?(\.weight|\.bias)?"  # the name of PEFT's adapter, and what the tensor is
_WHOLE = {"weight": "whole", "bias": "whole_bias"}  # the end of the key of a layer that was saved whole -> its part
_OF_BIAS = {"B": "lora_bias", "whole": "whole_bias"}  # a part whose key ends with .bias -> the part that it is then

Spelled = tuple[dict[str, Array], dict[str, object]]  # float32 arrays by key; facts for metadata and sidecar


def _only_read(lora: LoRA, spelling: Spelling) -> Spelled:
    raise ConfigError(f"LoRA keys of {spelling.software} can be read, but not written")


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How one tool writes LoRA keys. Modules and suffixes that it does not list are those of the checkpoint or kind."""

    software: str
    prefixes: tuple[str, ...] = ()  # all of these are read, the first is written
    wrappers: tuple[str, ...] = ()  # read too, before and after any prefix
    style: str = ""  # the name of the suffixes below, in the name of a dialect
    suffixes: Mapping[str, str] = field(default_factory=dict)  # suffix -> part; the first suffix of a part is written
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a module of a block -> its official layers
    separator: str = "."  # written instead of the dots of a module; reading accepts "." and "_"
    alpha: AlphaSource | None = None  # the place of the alpha of files without alpha keys
    whole_layers: bool = False  # whether <layer>.weight below its wrappers is a layer that was saved whole
    naming: str = ""  # the name that a user gives to have it written; empty: it is only read
    write: Callable[[LoRA, Spelling], Spelled] = _only_read  # a function of `namings`, or its own
    low_rank_only: bool = False  # whether `write` has no keys for other kinds

    def is_of(self, prefix: str, style: str) -> bool:
        """Whether keys with this prefix and style can be of this tool: by its style, its prefixes or its wrappers."""
        names = (*self.prefixes, *self.wrappers)
        known = any(_flat(name) in _flat(prefix) if name else not prefix for name in names)
        return known or (bool(self.style) and style == self.style)

    def starts(self, prefix: str) -> int:
        """The length of the name of this tool that stands first in `prefix`. -1 if none of its names does."""
        names = (name for name in (*self.prefixes, *self.wrappers) if name or not prefix)
        return max((len(name) for name in names if _flat(prefix).startswith(_flat(name))), default=-1)


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
        names = {name for spelling in spellings for name in (*spelling.prefixes, *spelling.wrappers) if name}
        any_of = "|".join(_either(name) for name in sorted(names, key=len, reverse=True))
        self._prefix = re.compile(f"(?:{any_of})*")
        whole = {_flat(name) for spelling in spellings if spelling.whole_layers for name in spelling.wrappers}
        self._saved_whole = re.compile("|".join(map(re.escape, whole)) or "(?!)")
        self._suffixes = {".alpha": ("", "alpha")}
        self._block_modules: dict[str, tuple[str, ...]] = {name: (name,) for name in BLOCK_MODULES}
        for style, suffixes in (*((k.style, k.suffixes) for k in kinds), *((s.style, s.suffixes) for s in spellings)):
            self._suffixes |= {suffix.removesuffix(".weight"): (style, part) for suffix, part in suffixes.items()}
        for spelling in spellings:
            self._block_modules = {**spelling.modules, **self._block_modules}
        known = "|".join(re.escape(suffix) for suffix in sorted(self._suffixes, key=len, reverse=True))
        self._split = re.compile(f"(.*?)({known}){_TAIL}")
        names_of_modules = (*self._block_modules, *_GLOBAL_MODULES)  # official names are last, to replace equal ones
        self._dotted = {_flat(name): name for name in names_of_modules}

    def parse(self, key: str) -> Key | None:
        """The meaning of `key`. None if it is not a key of a Z-Image LoRA."""
        if match := self._split.fullmatch(key):
            path, suffix, tail = match.groups()
            style, part = self._suffixes[suffix]
            if tail == ".bias":
                part = _OF_BIAS.get(part, "")
        else:  # whole layers have their own names
            path, _, kind = key.rpartition(".")
            style, part = "", _WHOLE.get(kind, "")
        prefix = found.group() if (found := self._prefix.match(path)) else ""
        if not part or (not match and not self._saved_whole.search(_flat(prefix))):
            return None
        module = self._module(path.removeprefix(prefix))
        return Key(prefix, *module, style, part) if module else None

    def ends_like_lora(self, key: str) -> bool:
        """Whether `key` ends like the key of a LoRA, of Z-Image or of another model."""
        return self._split.fullmatch(key) is not None or unused_kind(key) != ""

    def _module(self, path: str) -> tuple[str, tuple[str, ...]] | None:
        """The dotted name of a module, and the official names of the layers that it holds. None if it is unknown."""
        flat = _flat(path)
        if block := _BLOCK.fullmatch(flat):
            stack, index, rest = block.groups()
            name = self._dotted.get(rest, rest)
            layers = tuple(f"{stack}.{index}.{layer}" for layer in self._block_modules.get(name, ()))
            return (f"{stack}.{index}.{name}", layers) if layers else None
        patch_key = self._patch_key
        if keyed := _KEYED.fullmatch(flat):
            patch_key = keyed[2]
            flat = "_".join(filter(None, (keyed[1], keyed[3])))
        layer = _GLOBAL_MODULES.get(self._dotted.get(flat, ""))
        return (path, (layer.format(key=patch_key),)) if layer else None


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _either(name: str) -> str:
    """A pattern of `name` with dots or with underscores."""
    return "[._]".join(map(re.escape, name.split(".")))


# suffix -> the name of a kind that Z-Image's layers cannot have, or that no engine applies
_UNUSED = {
    **dict.fromkeys((".hada_t1", ".hada_t2", ".lokr_t1", ".lokr_t2", ".lora_mid"), "a Tucker core for convolutions"),
    **dict.fromkeys((".oft_blocks", ".oft_diag", ".oft_R", ".oft_r", ".boft_R", ".boft_s"), "an OFT rotation"),
    **dict.fromkeys((".vera_lambda_b", ".vera_lambda_d"), "a VeRA vector"),
    **dict.fromkeys((".lora_E", ".ranknum"), "an AdaLoRA vector"),
    **dict.fromkeys((".lora_embedding_A", ".lora_embedding_B"), "a LoRA of an embedding"),
    ".ia3_l": "an IA3 vector",
}
_UNUSED_KEY = re.compile(f".*({'|'.join(map(re.escape, sorted(_UNUSED, key=len, reverse=True)))}){_TAIL}")


def unused_kind(key: str) -> str:
    """The kind of a tensor that cannot be used, by its key; "" if the key is of none of those known."""
    match = _UNUSED_KEY.fullmatch(key)
    return _UNUSED[match[1]] if match else ""


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
