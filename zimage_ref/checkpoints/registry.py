"""The table of components, and what follows from it. Nothing else lists them."""

from __future__ import annotations

from .component import AnyComponent
from .text_encoder import TEXT_ENCODER
from .transformer import TRANSFORMER
from .vae import VAE

_ENTRIES: tuple[AnyComponent, ...] = (TRANSFORMER, TEXT_ENCODER, VAE)
COMPONENTS = {component.name: component for component in _ENTRIES}

TOKENIZER = "tokenizer"  # the part of a model that is no network


def part_options() -> dict[str, str]:
    """Every part of a model that a file may be given for, and the help of its option."""
    options = {name: component.option_help for name, component in COMPONENTS.items()}
    return options | {TOKENIZER: "tokenizer.json, or its folder. It replaces the one in `model_dir`."}


def model_types() -> dict[str, str]:
    """Component by what `model_type` may call it."""
    return {alias: name for name, component in COMPONENTS.items() for alias in component.model_types}
