"""One network of Z-Image as files know it: a Component holds every fact about it.

Another network is one more file with its entry, named in `registry.COMPONENTS`: from there the folder of a model,
conversion, inspection, the options for its file and the record in a picture take what they need.
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Component(Generic[ConfigT]):
    """One network: what it is called, which parameters it has, and how files hold them."""

    name: str  # in tables, options and records; its folder in the official layout
    title: str  # in words
    family: str = "Z-Image"  # whose network it is, in words
    optional: bool = False  # whether a model is whole without it

    official: ConfigT  # the published config, for files that have none
    config_key: str  # a key of its config.json that no other component's has
    parameters: Callable[[ConfigT], Shapes]
    unused: Callable[[ConfigT], set[str]] = _none_unused  # parameters that a file may hold and no pipeline needs
    sizes: Callable[[Dialect[ConfigT], Tensors], ConfigT]  # read off shapes; see `sizes_of`
    not_quantized: str = ""  # why its weights stay as they are, if they do

    dialects: tuple[Dialect[ConfigT], ...]  # that are read
    namings: Mapping[str, Dialect[ConfigT]]  # that are written, by the value of `naming`
    prefixes: tuple[str, ...] = ()  # that other programs put before the names, longest first
    ignored: tuple[str, ...] = ()  # tensors that are left unread: copies, or without effect

    stem: str = "diffusion_pytorch_model"  # of its file in the official layout
    library: tuple[str, str]  # that has its class, and the class, for model_index.json
    flat_stems: tuple[str, ...] = ()  # of its file in a flat folder, and its usual names in ComfyUI
    comfy_folders: tuple[str, ...] = ()  # that ComfyUI keeps it in
    model_types: tuple[str, ...]  # what `model_type` calls it when it is converted

    @property
    def option_help(self) -> str:
        """What the option for its file says."""
        return f"File or folder of the {self.title}. It replaces the one in `model_dir`."

    def own_config(self, config: Config) -> ConfigT:
        """`config`, found by this component's name, as the type that it has. Raises TypeError for another's."""
        if not isinstance(config, type(self.official)):
            raise TypeError(f"{type(config).__name__} is no config of the {self.title}")
        return config

    def sizes_of(self, dialect: Dialect[ConfigT], tensors: Tensors) -> ConfigT:
        """A config with the sizes that the shapes of `tensors` show; the official one if they show none."""
        try:
            return self.sizes(dialect, tensors)
        except (ConfigError, IndexError, ZeroDivisionError):
            return self.official


AnyComponent: TypeAlias = "Component[Any]"  # in tables, which hold components of different configs


def count_numbered(tensors: Tensors, pattern: str, default: int) -> int:
    """How many numbers, from 0, `pattern` matches in its group in the names of `tensors`; `default` if none."""
    numbers = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    return min(max(numbers) + 1, len(tensors)) if numbers else default
