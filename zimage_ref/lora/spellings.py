"""How tools spell LoRA keys. To read or write another spelling, add one entry to SPELLINGS.

A key is <wrappers and prefixes><module><suffix>, each from a table. Prefixes, wrappers, spellings of modules and the
suffixes of A and B are here, the suffixes of other kinds in `kinds`. Every combination of them is read. Examples:

    diffusion_model.layers.0.attention.to_q.lora_A.weight       ComfyUI, ai-toolkit, mflux
    transformer.layers.0.attention.to_q.lora_B.weight           diffusers
    transformer.layers.0.attention.to_q.lora_down.weight        OneTrainer
    lora_unet_layers_0_attention_to_q.lora_down.weight          musubi-tuner
    lora_unet__layers_0_attention_to_q.lora_down.weight         VideoX-Fun
    layers.0.attention.to_q.lora_A.default.weight               DiffSynth
    pipe.dit.layers.0.attention.to_q.lora_A.default.weight      DiffSynth, not stripped
    base_model.model.layers.0.attention.to_q.lora_A.weight      PEFT
    layers.0.attention.to.q.lora.down.weight                    Anime-Z
    layers.0.attention.qkv.lora_a                               z-image-train
    lycoris_layers_0_attention_to_q.lokr_w1                     LyCORIS

Five are written. Their names are values of `naming` and `lora_format`. `clients` says which program reads which:

    comfy    diffusion_model.<layer>.lora_A.weight          alpha / rank multiplied into B
    peft     transformer.<layer>.lora_A.weight              the same; PEFT's config in the metadata
    kohya    diffusion_model.<layer>.lora_down.weight       an alpha key a layer
    musubi   lora_unet_<layer>.lora_down.weight             an alpha key a layer
    burn     <block>.attention.qkv.lora_a, fused            alpha in the sidecar `<stem>.lora.json`, one rank for all

Sources: the loaders of ComfyUI and diffusers, and the writers named above.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from zimage_ref.errors import ConfigError, WeightError, listing
from zimage_ref.model.parameters import LORA_TARGETS

from .alpha import ADAPTER_CONFIG, METADATA, SIDECAR, AlphaSource
from .keys import OFFICIAL_PATCH_KEY, Grammar, Spelled, Spelling
from .kinds import KINDS
from .namings import with_alpha_folded, with_alpha_keys, with_one_rank, with_peft_config
from .updates import LoRA

DEFAULT_NAMING = "comfy"
_A_B = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_DOWN_UP = {".lora_down.weight": "A", ".lora_up.weight": "B"}
*_QKV, _OUT = LORA_TARGETS["attention"]
_FUSED = {"attention.qkv": tuple(_QKV)}

SPELLINGS = {
    spelling.software: spelling
    for spelling in (
        Spelling(
            software="ComfyUI", prefixes=("diffusion_model.", "model.diffusion_model."),
            style="lora_A/B", suffixes=_A_B,
            modules={
                **_FUSED, "attention.out": (_OUT,),
                "attention.q_norm": ("attention.norm_q",), "attention.k_norm": ("attention.norm_k",),
            },
            naming="comfy", write=with_alpha_folded,
        ),
        Spelling(
            software="diffusers", prefixes=("transformer.",), style="lora_A/B", suffixes=_A_B, alpha=METADATA,
            naming="peft", write=with_peft_config, low_rank_only=True,
        ),
        Spelling(
            software="kohya", prefixes=("lora_unet_", "lora_transformer_"), separator="_",
            style="lora_down/up", suffixes=_DOWN_UP, naming="musubi", write=with_alpha_keys,
        ),
        Spelling(
            software="kohya with dots", prefixes=("diffusion_model.", "unet."),
            style="lora_down/up", suffixes=_DOWN_UP, naming="kohya", write=with_alpha_keys,
        ),
        Spelling(software="OneTrainer", prefixes=("transformer.",), style="lora_down/up", suffixes=_DOWN_UP),
        Spelling(software="VideoX-Fun", prefixes=("lora_unet__",), style="lora_down/up", suffixes=_DOWN_UP),
        Spelling(
            software="z-image-train", style="lora_a/b", suffixes={".lora_a": "A", ".lora_b": "B"},
            modules={**_FUSED, "attention.to_out": (_OUT,)}, alpha=SIDECAR,
            naming="burn", write=with_one_rank, low_rank_only=True,
        ),
        Spelling(
            software="PEFT", wrappers=("base_model.model.", "base_model."), alpha=ADAPTER_CONFIG, whole_layers=True,
        ),
        Spelling(software="DiffSynth", wrappers=("pipe.dit.", "pipe.", "dit.")),
        Spelling(software="torch", wrappers=("model.", "module.", "_orig_mod.")),  # parallel and compiled modules
        Spelling(software="LyCORIS", prefixes=("lycoris_",)),
        Spelling(software="bare", prefixes=("",)),
        Spelling(software="Anime-Z", style="lora.down/up", suffixes={".lora.down.weight": "A", ".lora.up.weight": "B"}),
        Spelling(
            software="old diffusers", style="lora.lora_A/B",
            suffixes={
                ".lora.lora_A.weight": "A", ".lora.lora_B.weight": "B",
                ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B",
            },
        ),
    )
}  # fmt: skip


def grammar(patch_key: str = OFFICIAL_PATCH_KEY) -> Grammar:
    """The keys of all spellings and kinds."""
    return Grammar(SPELLINGS.values(), KINDS.values(), patch_key)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether any key ends like the key of a LoRA, of Z-Image or of another model."""
    known = grammar()
    return any(map(known.ends_like_lora, keys))


def software(prefix: str, style: str) -> str:
    """The tool whose keys have this prefix and style. Only one tool uses a style without a prefix.

    Else the tool of the outermost prefix or wrapper, and of several with the same one the tool with this style.
    """
    known = SPELLINGS.values()
    if own := [s.software for s in known if s.style == style and not (s.prefixes or s.wrappers)]:
        return own[0]
    best = max(known, key=lambda s: (s.starts(prefix), s.style == style), default=None)
    return best.software if best is not None and best.starts(prefix) >= 0 else ""


def alpha_sources(prefix: str, style: str) -> list[AlphaSource]:
    """The places that may hold the alpha of a file without alpha keys, for keys of this prefix and style."""
    return [s.alpha for s in SPELLINGS.values() if s.alpha and (s.alpha.for_all or s.is_of(prefix, style))]


def companions(path: Path) -> list[Path]:
    """The files beside a LoRA that may hold its alpha: z-image-train's and PEFT's."""
    return [s.alpha.beside(path) for s in SPELLINGS.values() if s.alpha is not None and s.alpha.beside is not None]


def lora_namings() -> tuple[str, ...]:
    """The namings: names of the spellings that can be written."""
    return tuple(spelling.naming for spelling in SPELLINGS.values() if spelling.naming)


def namings_of_every_kind() -> list[str]:
    """The namings that have keys for every kind of update."""
    return [naming for naming in lora_namings() if not spelling_of(naming).low_rank_only]


def spelling_of(naming: str) -> Spelling:
    """The spelling with the name `naming`. Raises ConfigError if there is none."""
    for spelling in SPELLINGS.values():
        if spelling.naming == naming and naming:
            return spelling
    raise ConfigError(f"unknown naming {naming!r} of LoRA keys: known are {', '.join(lora_namings())}")


def spelled(lora: LoRA, spelling: Spelling) -> Spelled:
    """`lora` as the tensors of a file. Raises WeightError if the spelling has no keys for an update."""
    others = [f"{name} ({update.title})" for name, update in lora.items() if update.low_rank is None]
    if others and spelling.low_rank_only:
        able = " or ".join(namings_of_every_kind())
        raise WeightError(f"the {spelling.naming} naming has low-rank updates only, not {listing(others)}: use {able}")
    return spelling.write(lora, spelling)
