"""What a user can ask for: each option once, with its default, type, help text and bounds.

The command line, the Python interface and the README all take them from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .lora_namings import NAMINGS
from .names import LORA_TARGETS


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the help text that the command line shows."""
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """A dataclass field without a default."""
    return field(metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """A LoRA training run. Raises ConfigError for values out of bounds."""

    model_dir: Path = required("folder with the Z-Image model")
    dataset: Path = required("folder with pictures and .txt captions")
    output: Path = option(Path("lora_weights.safetensors"), "LoRA file to write (.safetensors)")
    rank: int = option(16, "rank of the LoRA matrices")
    alpha: float = option(16.0, "LoRA strength; the update is scaled by alpha / rank")
    epochs: int = option(100, "passes over the dataset")
    lr: float = option(1e-4, "learning rate of AdamW")
    resolution: int = option(256, "side of the square that pictures are scaled and cropped to, in pixels")
    save_every: int = option(0, "also save every N steps (0: only at the end)")
    seed: int = option(0, "seed of noise, times, order and initialisation")
    weight_decay: float = option(1e-2, "weight decay of AdamW")
    targets: tuple[str, ...] = option((*LORA_TARGETS, "refiners"), "layers to train: attention, feed_forward, refiners")
    lora_format: str = option("comfy", f"key naming of the LoRA file: {', '.join(NAMINGS)}")

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank", "epochs")
        _at_least(self, 0, "save_every", "seed", "weight_decay")
        for name in ("alpha", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name} {getattr(self, name)} must be above 0")
        _check_side("resolution", self.resolution)
        if self.lora_format not in NAMINGS:
            raise ConfigError(f"--lora-format {self.lora_format!r} must be one of {', '.join(NAMINGS)}")
        if self.output.suffix != ".safetensors":
            raise ConfigError(f"--output {self.output}: a LoRA is written as .safetensors")


@dataclass(frozen=True)
class GenerateConfig:
    """What a picture should be. Raises ConfigError for values out of bounds."""

    prompt: str = required("what the picture shows")
    width: int = option(512, "width in pixels, a multiple of 16")
    height: int = option(512, "height in pixels, a multiple of 16")
    steps: int = option(8, "denoising steps")
    guidance: float = option(0.0, "classifier-free guidance; 0 is none, as Turbo wants it")
    negative_prompt: str = option("", "what the picture should not show; needs guidance")
    seed: int = option(0, "seed of the starting noise")

    def __post_init__(self) -> None:
        _check_side("width", self.width)
        _check_side("height", self.height)
        _at_least(self, 1, "steps")
        _at_least(self, 0, "seed", "guidance")


SIDE_MULTIPLE = 16  # 8 pixels a latent, 2 x 2 latents a token


def _check_side(name: str, side: int) -> None:
    if side < SIDE_MULTIPLE or side % SIDE_MULTIPLE:
        nearest = max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE)
        raise ConfigError(f"--{name} {side} must be a multiple of {SIDE_MULTIPLE}: {nearest} is the nearest")


def _at_least(config: Any, low: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= low:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at least {low}")
