"""Finding the parts of Z-Image in a folder: the official layout and the flat one of the original Rust tool.

    official    transformer/ text_encoder/ vae/ tokenizer/ scheduler/, each with its config, as on Hugging Face
    flat        z_image_turbo_bf16.npz, qwen3_4b_text_encoder.npz, ae.npz, tokenizer.json in one folder

A part of a flat folder takes its config from the record in its npz, else from the official sub-folder's JSON where
that is there, else the official one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config as cfg
from . import names
from .checkpoint import SUFFIXES, Checkpoint, find_weights, require
from .config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig, read_json
from .errors import ConfigError, FormatError
from .tensors import Tensor


@dataclass(frozen=True)
class Component:
    """One of the three networks: how its config is read, which parameters it has, how flat folders call its file."""

    config: Any  # the config class
    official: Any  # its published values
    parameters: Callable[[Any], names.Shapes]
    unused: Callable[[Any], set[str]]  # parameters that the file may hold and the pipeline does not need
    flat_stems: tuple[str, ...]  # in order of preference

    def check(self, file: Checkpoint, config: Any) -> dict[str, Tensor]:
        """All tensors of `file`, by official name. Raises WeightError unless they are those of the model."""
        tensors = file.tensors
        if "embed_tokens.weight" in tensors:  # named as of Qwen3Model; the official file is of Qwen3ForCausalLM
            tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        require(tensors, self.parameters(config), self.unused(config), file.path)
        return tensors

    def used(self, file: Checkpoint, config: Any) -> dict[str, Tensor]:
        """The tensors of `file` that the pipeline needs. Raises WeightError as `check` does."""
        unused = self.unused(config)
        return {name: tensor for name, tensor in self.check(file, config).items() if name not in unused}


COMPONENTS = {
    "transformer": Component(
        TransformerConfig, cfg.OFFICIAL_TRANSFORMER, names.transformer_parameters, lambda config: set(),
        ("z_image_turbo_f16", "z_image_turbo_bf16", "z_image_turbo", "z_image"),
    ),
    "text_encoder": Component(
        TextEncoderConfig, cfg.OFFICIAL_TEXT_ENCODER, names.text_encoder_parameters, names.text_encoder_unused,
        ("qwen3_4b_text_encoder",),
    ),
    "vae": Component(VAEConfig, cfg.OFFICIAL_VAE, names.vae_parameters, lambda config: set(), ("ae",)),
}  # fmt: skip
TINY = "tiny"  # names the model inside this package, where no folder has that name
_TINY_FOLDER = Path(__file__).with_name("tiny")
_TOKENIZERS = ("tokenizer/tokenizer.json", "tokenizer.json", "qwen3-tokenizer.json")


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
    def open(cls, path: Path) -> ModelFolder:
        """Finds and checks all parts of the model in `path`; "tiny" is the one that comes with this package.

        Raises ConfigError or FormatError naming every place that was looked at, WeightError where shapes do not fit.
        """
        path = Path(path)
        if str(path) == TINY and not path.is_dir():
            path = _TINY_FOLDER
        if not path.is_dir():
            raise ConfigError(f"{path}: is not a folder: --model-dir takes one that holds a Z-Image model")
        tokenizer = _first_file(path, _TOKENIZERS, "tokenizer")
        files = {name: Checkpoint.open(_weights_path(path, name)) for name in COMPONENTS}
        configs = {name: _config(file, name, path) for name, file in files.items()}
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
        weights = {name: COMPONENTS[name].used(file, configs[name]) for name, file in files.items()}
        return cls(path, transformer, text_encoder, vae, _scheduler(path), tokenizer, weights)

    @property
    def size_multiple(self) -> int:
        """Width and height in pixels are multiples of this."""
        return self.vae.factor * self.transformer.patch_size


def _weights_path(folder: Path, component: str) -> Path:
    official = folder / component
    if official.is_dir() and any(p.suffix in SUFFIXES for p in official.iterdir()):
        return find_weights(official)
    flat = [f"{stem}{suffix}" for stem in COMPONENTS[component].flat_stems for suffix in SUFFIXES]
    return _first_file(folder, flat, f"{component.replace('_', ' ')}", extra=f"{component}/")


def _first_file(folder: Path, candidates: Sequence[str], what: str, extra: str = "") -> Path:
    for name in candidates:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join([extra, *candidates] if extra else candidates)
    raise FormatError(f"{folder}: holds no {what}: looked for {looked}")


def _config(file: Checkpoint, component: str, folder: Path) -> Any:
    """The config of `file`: in its own record, else as JSON beside it or in `folder`, else the official one."""
    kind, own = COMPONENTS[component], file.path.parent / "config.json"
    if "config" in file.metadata:
        return kind.config.from_json(file.metadata["config"], str(file.path))
    for path in (own, folder / component / "config.json"):
        if path.is_file():
            return kind.config.from_json(read_json(path), str(path))
    if file.path.parent.name == component:
        raise ConfigError(f"{own}: is missing")
    return kind.official


def _scheduler(folder: Path) -> SchedulerConfig:
    file = folder / "scheduler" / "scheduler_config.json"
    return SchedulerConfig.from_json(read_json(file), str(file)) if file.is_file() else cfg.OFFICIAL_SCHEDULER


def checked_component(file: Checkpoint, component: str) -> tuple[dict[str, Tensor], Any]:
    """All tensors of a file of `component`, by official name, and their config.

    Raises WeightError or ConfigError where they do not fit each other.
    """
    config = _config(file, component, file.path.parent)
    return COMPONENTS[component].check(file, config), config
