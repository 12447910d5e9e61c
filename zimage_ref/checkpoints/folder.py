"""Finding the parts of Z-Image: in one folder of any known layout, or named one by one.

    official    transformer/ text_encoder/ vae/ tokenizer/ scheduler/, each with its config, as on Hugging Face
    flat        z_image_turbo_bf16.npz, qwen3_4b_text_encoder.npz, ae.npz, tokenizer.json, of the original Rust tool
    ComfyUI     diffusion_models/ text_encoders/ vae/, one safetensors file each; it keeps no tokenizer

A part takes its config from the record in its file, else from the JSON beside it or in the official sub-folder, else
it is the official one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats.checkpoint import READABLE, Checkpoint, find_weights
from zimage_ref.formats.json_file import read_json
from zimage_ref.formats.tensors import Tensor
from zimage_ref.model import config as cfg
from zimage_ref.model.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig

from .components import COMPONENTS, config_of, official_weights, parse_config
from .hub import local_folder

# component -> stems of its file in a flat folder, and its folders in ComfyUI, with its file's usual names there
FLAT_STEMS = {
    "transformer": ("z_image_turbo_f16", "z_image_turbo_bf16", "z_image_turbo", "z_image_bf16", "z_image"),
    "text_encoder": ("qwen3_4b_text_encoder", "qwen_3_4b"),
    "vae": ("ae",),
}
COMFY_FOLDERS = {
    "transformer": ("diffusion_models", "unet"), "text_encoder": ("text_encoders", "clip"), "vae": ("vae",),
}  # fmt: skip
TOKENIZERS = ("tokenizer/tokenizer.json", "tokenizer.json", "qwen3-tokenizer.json")


@dataclass(frozen=True)
class ModelFolder:
    """A whole model: every config, and every tensor of the three networks, checked by header but not yet read."""

    path: Path
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    tokenizer: Path
    weights: dict[str, dict[str, Tensor]]  # component -> official name -> tensor

    @classmethod
    def open(cls, path: Path, parts: Mapping[str, Path | None] | None = None) -> ModelFolder:
        """Finds and checks all parts of the model in `path`, a folder or, with the extra `hub`, a repository's id.

        `parts` names files or folders of transformer, text_encoder, vae and tokenizer that stand in for what `path`
        holds. Raises ConfigError or FormatError naming every place that was looked at, WeightError where shapes do
        not fit.
        """
        path = local_folder(path)
        places = find_parts(path, parts)
        files = {name: Checkpoint.open(places[name]) for name in COMPONENTS}
        configs = {name: config_of(file, name, path) or COMPONENTS[name].official for name, file in files.items()}
        weights = {name: _used(file, name, configs[name]) for name, file in files.items()}
        transformer, text_encoder, vae = (configs[name] for name in COMPONENTS)
        if transformer.cap_feat_dim != text_encoder.hidden_size:
            raise ConfigError(
                f"{path}: the transformer takes captions of width {transformer.cap_feat_dim}, "
                f"the text encoder makes {text_encoder.hidden_size}"
            )
        if transformer.in_channels != vae.latent_channels:
            raise ConfigError(
                f"{path}: the transformer takes {transformer.in_channels} latent channels, "
                f"the vae makes {vae.latent_channels}"
            )
        return cls(path, transformer, text_encoder, vae, scheduler_config(path), places["tokenizer"], weights)

    @property
    def size_multiple(self) -> int:
        """Width and height in pixels are multiples of this."""
        return self.vae.factor * self.transformer.patch_size


def find_parts(folder: Path, parts: Mapping[str, Path | None] | None = None) -> dict[str, Path]:
    """The file of each component and of the tokenizer. Raises FormatError naming all places that were looked at."""
    given = {name: Path(path) for name, path in (parts or {}).items() if path is not None}
    for name, path in given.items():
        if not path.exists():
            raise FormatError(f"`{name}` {path}: is not there")
    found = {name: given[name] if name in given else find_component(folder, name) for name in COMPONENTS}
    return found | {"tokenizer": _tokenizer(folder, given.get("tokenizer"))}


def find_component(folder: Path, component: str) -> Path:
    """The file of `component` in a model's folder of any layout."""
    official = folder / component
    if _holds_weights(official):
        return find_weights(official)
    flat = [f"{stem}{suffix}" for stem in FLAT_STEMS[component] for suffix in READABLE]
    comfy = COMFY_FOLDERS[component]
    for home in (folder, *(folder / name for name in comfy)):
        for name in flat:
            if (home / name).is_file():
                return home / name
    for name in comfy:
        if _holds_weights(folder / name):
            return find_weights(folder / name)
    folders = ", ".join(f"{name}/" for name in dict.fromkeys((component, *comfy)))
    raise FormatError(
        f"{folder}: holds no {COMPONENTS[component].title}: looked for {folders}, and for "
        f"{', '.join(FLAT_STEMS[component])} with {', '.join(READABLE)}; give one as `{component}`"
    )


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and any(file.name.endswith((*READABLE, ".index.json")) for file in folder.iterdir())


def _tokenizer(folder: Path, given: Path | None) -> Path:
    if given is not None and given.is_file():
        return given
    home = given or folder
    for name in TOKENIZERS:
        if (home / name).is_file():
            return home / name
    raise FormatError(
        f"{home}: holds no tokenizer: looked for {', '.join(TOKENIZERS)}; give one as `tokenizer`"
        + ("" if given else " (ComfyUI has none: take tokenizer/tokenizer.json of Tongyi-MAI/Z-Image-Turbo)")
    )


def _used(file: Checkpoint, component: str, config: Any) -> dict[str, Tensor]:
    unused = COMPONENTS[component].unused(config)
    return {name: t for name, t in official_weights(file, component, config).items() if name not in unused}


def scheduler_config(folder: Path) -> SchedulerConfig:
    """The sampling schedule of a model's folder; Turbo's where it has none."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return cfg.OFFICIAL_SCHEDULER
    return parse_config(SchedulerConfig, read_json(file, ConfigError), str(file))
