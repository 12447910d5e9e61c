"""The one table of components, and the lists that follow from it."""

from __future__ import annotations

from .component import AnyComponent
from .controlnet import CONTROLNET
from .text_encoder import TEXT_ENCODER
from .transformer import TRANSFORMER
from .vae import VAE

_ENTRIES: tuple[AnyComponent, ...] = (TRANSFORMER, TEXT_ENCODER, VAE, CONTROLNET)
COMPONENTS = {component.name: component for component in _ENTRIES}

TOKENIZER = "tokenizer"  # the one part of a model that is not a network


def model_parts() -> dict[str, AnyComponent]:
    """The networks that belong to a model."""
    return {name: component for name, component in COMPONENTS.items() if not component.apart}


def part_options() -> dict[str, str]:
    """Every part of a model that you can give a file for -> the help text of its option."""
    options = {name: component.option_help for name, component in model_parts().items()}
    return options | {TOKENIZER: "tokenizer.json, or its folder. It replaces the one in `model_dir`."}


def model_types() -> dict[str, str]:
    """Each value of `model_type` -> the name of its component."""
    return {alias: name for name, component in COMPONENTS.items() for alias in component.model_types}
