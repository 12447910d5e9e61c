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
from typing import Any, TypeVar

from . import config as cfg
from . import names
from .checkpoint import SUFFIXES, Checkpoint, find_weights
from .config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig, read_json
from .errors import ConfigError, FormatError
from .tensors import Tensor

Config = TypeVar("Config", TransformerConfig, TextEncoderConfig, VAEConfig)

# component -> stems of flat files, in order of preference
FLAT_STEMS = {
    "transformer": ("z_image_turbo_f16", "z_image_turbo_bf16", "z_image_turbo", "z_image"),
    "text_encoder": ("qwen3_4b_text_encoder",),
    "vae": ("ae",),
}
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
        """Finds and checks all parts of the model in `path`.

        Raises ConfigError or FormatError naming every place that was looked at, WeightError where shapes do not fit.
        """
        path = Path(path)
        if not path.is_dir():
            raise ConfigError(f"{path}: is not a folder: --model-dir takes one that holds a Z-Image model")
        tokenizer = _first_file(path, _TOKENIZERS, "tokenizer")
        files = {name: Checkpoint.open(_weights_path(path, name)) for name in FLAT_STEMS}
        transformer = _config(path, "transformer", files, TransformerConfig.from_json, cfg.OFFICIAL_TRANSFORMER)
        text_encoder = _config(path, "text_encoder", files, TextEncoderConfig.from_json, cfg.OFFICIAL_TEXT_ENCODER)
        vae = _config(path, "vae", files, VAEConfig.from_json, cfg.OFFICIAL_VAE)
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
        weights = {
            "transformer": files["transformer"].require(names.transformer_parameters(transformer)),
            "text_encoder": _prefixed(files["text_encoder"]).require(
                names.text_encoder_parameters(text_encoder), names.text_encoder_unused(text_encoder)
            ),
            "vae": files["vae"].require(names.vae_parameters(vae)),
        }
        return cls(path, transformer, text_encoder, vae, _scheduler(path), tokenizer, weights)

    @property
    def size_multiple(self) -> int:
        """Width and height in pixels are multiples of this."""
        return self.vae.factor * self.transformer.patch_size


def _weights_path(folder: Path, component: str) -> Path:
    official = folder / component
    if official.is_dir() and any(p.suffix in SUFFIXES for p in official.iterdir()):
        return find_weights(official)
    flat = [f"{stem}{suffix}" for stem in FLAT_STEMS[component] for suffix in SUFFIXES]
    return _first_file(folder, flat, f"{component.replace('_', ' ')}", extra=f"{component}/")


def _first_file(folder: Path, candidates: Sequence[str], what: str, extra: str = "") -> Path:
    for name in candidates:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join([extra, *candidates] if extra else candidates)
    raise FormatError(f"{folder}: holds no {what}: looked for {looked}")


def _config(
    folder: Path,
    component: str,
    files: dict[str, Checkpoint],
    parse: Callable[[dict[str, Any], str], Config],
    official: Config,
) -> Config:
    file, beside = files[component], folder / component / "config.json"
    if file.container == "npz" and "config" in file.metadata:
        return parse(file.metadata["config"], str(file.path))
    if beside.is_file():
        return parse(read_json(beside), str(beside))
    if file.path.parent != folder:
        raise ConfigError(f"{beside}: is missing")
    return official


def _scheduler(folder: Path) -> SchedulerConfig:
    file = folder / "scheduler" / "scheduler_config.json"
    return SchedulerConfig.from_json(read_json(file), str(file)) if file.is_file() else cfg.OFFICIAL_SCHEDULER


def _prefixed(file: Checkpoint) -> Checkpoint:
    """Text encoders come with names as of Qwen3ForCausalLM (official) or of Qwen3Model, without `model.`."""
    if "embed_tokens.weight" not in file.tensors:
        return file
    return Checkpoint(file.path, file.container, {f"model.{k}": v for k, v in file.tensors.items()}, file.metadata)
