"""One network of Z-Image. A Component holds every fact about it that files, options and tables need.

To add a network, write one file with its Component and list it in `registry.COMPONENTS`. Model folders, conversion,
inspection, the option for its file and the record in a picture all take their facts from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Tensors
from zimage_ref.model.config_reader import Config
from zimage_ref.model.parameters import Shapes

from .dialects import Dialect

ConfigT = TypeVar("ConfigT", bound=Config)

CONFIG_FILE = "config.json"  # beside the weights, in every layout


def _none_unused(config: Config) -> set[str]:
    return set()


def _no_variant(config: Config) -> str:
    return ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Component(Generic[ConfigT]):
    """One network: its names, its parameters, and how files store them."""

    name: str  # in tables, options and records; also its folder in the official layout
    title: str  # for people
    family: str = "Z-Image"  # the model that the network comes from, for people
    optional: bool = False  # whether a model is complete without it
    apart: bool = False  # whether it is given for a picture, so that the folder of a model does not count with it
    variant: Callable[[ConfigT], str] = _no_variant  # which of several networks it is, for people

    official: ConfigT  # the published config, for files without one
    config_key: str  # a key that only this component's config.json has
    parameters: Callable[[ConfigT], Shapes]
    unused: Callable[[ConfigT], set[str]] = _none_unused  # parameters that a file may hold but no pipeline needs
    sizes: Callable[[Dialect[ConfigT], Tensors], ConfigT]  # reads the sizes from shapes; see `sizes_of`
    not_quantized: str = ""  # the reason if its weights are never quantized

    dialects: tuple[Dialect[ConfigT], ...]  # dialects that can be read
    namings: Mapping[str, Dialect[ConfigT]]  # dialects that can be written, by the value of `naming`
    prefixes: tuple[str, ...] = ()  # prefixes of names in files of other programs, longest first
    ignored: tuple[str, ...] = ()  # tensors that are not read: copies, or tensors without effect

    stem: str = "diffusion_pytorch_model"  # the stem of its file in the official layout
    library: tuple[str, str]  # (library, class) for model_index.json
    flat_stems: tuple[str, ...] = ()  # stems of its file in a flat folder and in ComfyUI
    comfy_folders: tuple[str, ...] = ()  # its folders in ComfyUI
    model_types: tuple[str, ...]  # its names as a value of `model_type`, for conversion

    @property
    def option_help(self) -> str:
        """What the option for its file says."""
        return f"File or folder of the {self.title}. It replaces the one in `model_dir`."

    def own_config(self, config: Config) -> ConfigT:
        """`config` as this component's config type. Raises TypeError if it is a config of another component."""
        if not isinstance(config, type(self.official)):
            raise TypeError(f"{type(config).__name__} is no config of the {self.title}")
        return config

    def sizes_of(self, dialect: Dialect[ConfigT], tensors: Tensors) -> ConfigT:
        """A config with the sizes that the shapes of `tensors` show, or the official config if they show no sizes."""
        try:
            return self.sizes(dialect, tensors)
        except (ConfigError, IndexError, ZeroDivisionError):
            return self.official


AnyComponent: TypeAlias = "Component[Any]"  # for tables, which hold components with different config types


def count_numbered(tensors: Tensors, pattern: str, default: int) -> int:
    """How many things are numbered in the names of `tensors`; the group of `pattern` matches a number, from 0.

    `default` if no name matches.
    """
    known = re.compile(pattern)
    numbers = {int(match[1]) for name in tensors if (match := known.match(name))}
    return min(max(numbers) + 1, len(tensors)) if numbers else default
