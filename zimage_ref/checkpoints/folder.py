"""Finds the parts of a Z-Image model: in one folder of a known layout, or in files that you name one by one.

    official    transformer/ text_encoder/ vae/ tokenizer/ scheduler/, each with its config, as on Hugging Face
    flat        z_image_turbo_bf16.npz, qwen3_4b_text_encoder.npz, ae.npz, tokenizer.json, of the original Rust tool
    ComfyUI     diffusion_models/ text_encoders/ vae/, one safetensors file each; it keeps no tokenizer

The config of a part comes from the record in its file, else from the JSON beside it or in the official sub-folder.
If there is neither, it is the official config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats.checkpoint import READABLE, Checkpoint, find_weights
from zimage_ref.formats.folders import own_files
from zimage_ref.formats.json_file import read_json
from zimage_ref.formats.shards import INDEX_SUFFIX
from zimage_ref.formats.tensors import Tensor
from zimage_ref.model.config import (
    OFFICIAL_SCHEDULER,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    size_multiple,
)
from zimage_ref.model.config_reader import Config, parse_config

from .component import AnyComponent, Component, ConfigT
from .hub import local_folder
from .identify import config_of, official_weights
from .registry import TOKENIZER, model_parts
from .text_encoder import TEXT_ENCODER
from .transformer import TRANSFORMER
from .vae import VAE

TOKENIZERS = ("tokenizer/tokenizer.json", "tokenizer.json", "qwen3-tokenizer.json")


@dataclass(frozen=True)
class ModelFolder:
    """A whole model: its configs, and the tensors of its networks. Headers are checked; data is not read yet.

    The keys of `configs` and `weights` are names of components. A missing optional component is in neither.
    """

    path: Path
    configs: Mapping[str, Config]
    weights: dict[str, dict[str, Tensor]]  # component -> official name -> tensor
    scheduler: SchedulerConfig
    tokenizer: Path
    files: Mapping[str, Path] = field(default_factory=dict)  # component -> the file or folder that was named or found
    # component -> official name -> tensor that no picture needs; those of the text encoder, to write text
    spare: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, parts: Mapping[str, Path | None] | None = None) -> ModelFolder:
        """Finds and checks all parts of the model in `path`, a folder or, with the extra `hub`, a repository's id.

        parts: files or folders to use instead of those in `path`, by the names of `registry.part_options`.
        Raises ConfigError or FormatError naming all places that were searched, WeightError if shapes do not fit.
        """
        path = local_folder(path)
        places = find_parts(path, parts)
        configs: dict[str, Config] = {}
        weights, spare = {}, {}
        for name, component in model_parts().items():
            if name in places:
                file = Checkpoint.open(places[name])
                configs[name] = config_of(file, component, path) or component.official
                weights[name], spare[name] = _used_and_spare(file, component, configs[name])
        model = cls(path, configs, weights, scheduler_config(path), places[TOKENIZER], places, spare)
        model._check_widths()
        return model

    def config(self, component: Component[ConfigT]) -> ConfigT:
        """The config of `component`. Raises KeyError if the component is optional and missing."""
        return component.own_config(self.configs[component.name])

    @property
    def transformer(self) -> TransformerConfig:
        """The diffusion transformer's sizes."""
        return self.config(TRANSFORMER)

    @property
    def text_encoder(self) -> TextEncoderConfig:
        """The text encoder's sizes."""
        return self.config(TEXT_ENCODER)

    @property
    def vae(self) -> VAEConfig:
        """The autoencoder's sizes."""
        return self.config(VAE)

    @property
    def size_multiple(self) -> int:
        """Width and height of a picture in pixels must be multiples of this."""
        return size_multiple(self.transformer, self.vae)

    def _check_widths(self) -> None:
        """Raises ConfigError if the output of one network does not fit the input of another."""
        if self.transformer.cap_feat_dim != self.text_encoder.hidden_size:
            raise ConfigError(
                f"{self.path}: the transformer takes captions of width {self.transformer.cap_feat_dim}, "
                f"the text encoder makes {self.text_encoder.hidden_size}"
            )
        if self.transformer.in_channels != self.vae.latent_channels:
            raise ConfigError(
                f"{self.path}: the transformer takes {self.transformer.in_channels} latent channels, "
                f"the vae makes {self.vae.latent_channels}"
            )


def find_parts(folder: Path, parts: Mapping[str, Path | None] | None = None) -> dict[str, Path]:
    """The file of the tokenizer and of each component that exists.

    Raises FormatError naming all places that were searched if one is missing and not optional.
    """
    given = {name: Path(path) for name, path in (parts or {}).items() if path is not None}
    for name, path in given.items():
        if not path.exists():
            raise FormatError(f"`{name}` {path}: is not there")
    found = {}
    for name, component in model_parts().items():
        if name in given:
            found[name] = given[name]
        elif (file := component_file(folder, component)) is not None:
            found[name] = file
        elif not component.optional:
            raise _absent(folder, component)
    return found | {TOKENIZER: find_tokenizer(folder, given.get(TOKENIZER))}


def find_component(folder: Path, component: AnyComponent) -> Path:
    """As `component_file`. If there is no such file, raises FormatError naming all places that were searched."""
    file = component_file(folder, component)
    if file is None:
        raise _absent(folder, component)
    return file


def component_file(folder: Path, component: AnyComponent) -> Path | None:
    """The file of `component` in the folder of a model, in any layout. None if there is none."""
    official = folder / component.name
    if _holds_weights(official):
        return find_weights(official)
    flat = [f"{stem}{suffix}" for stem in component.flat_stems for suffix in READABLE]
    for place in (folder, *(folder / name for name in component.comfy_folders)):
        for name in flat:
            if (place / name).is_file():
                return place / name
    for name in component.comfy_folders:
        if _holds_weights(folder / name):
            return find_weights(folder / name)
    return None


def _absent(folder: Path, component: AnyComponent) -> FormatError:
    folders = ", ".join(f"{name}/" for name in dict.fromkeys((component.name, *component.comfy_folders)))
    files = f", and for {', '.join(component.flat_stems)} with {', '.join(READABLE)}" if component.flat_stems else ""
    return FormatError(
        f"{folder}: holds no {component.title}: looked for {folders}{files}; give one as `{component.name}`"
    )


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and any(file.name.endswith((*READABLE, INDEX_SUFFIX)) for file in own_files(folder))


def find_tokenizer(folder: Path, given: Path | None = None) -> Path:
    """The file of the tokenizer: `given`, or inside the folder `given`; without `given`, inside `folder`.

    Raises FormatError if there is none.
    """
    if given is not None and given.is_file():
        return given
    place = given or folder
    for name in TOKENIZERS:
        if (place / name).is_file():
            return place / name
    raise FormatError(
        f"{place}: holds no tokenizer: looked for {', '.join(TOKENIZERS)}; give one as `{TOKENIZER}`"
        + ("" if given else " (ComfyUI has none: take tokenizer/tokenizer.json of Tongyi-MAI/Z-Image-Turbo)")
    )


def _used_and_spare(
    file: Checkpoint, component: AnyComponent, config: Config
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    unused, tensors = component.unused(config), official_weights(file, component, config)
    used = {name: tensor for name, tensor in tensors.items() if name not in unused}
    return used, {name: tensor for name, tensor in tensors.items() if name in unused}


def scheduler_config(folder: Path) -> SchedulerConfig:
    """The config of the scheduler in the folder of a model; Turbo's if the folder has none."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return OFFICIAL_SCHEDULER
    return parse_config(SchedulerConfig, read_json(file, ConfigError), str(file))
