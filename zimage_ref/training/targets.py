"""Which layers a run trains, and how large the update of each may become.

    attention                           a preset: a name in TARGETS
    layers.10-20.attention.*            a pattern: * stands for any text, 10-20 for a range of blocks
    layers.3                            everything below a name
    attention=32    layers.3=8/4        rank, and alpha if it is given; else alpha / rank is that of the run

An entry with a rank counts more than one without, and a later one more than an earlier one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from zimage_ref.bounds import LORA_RANK, TRAINING
from zimage_ref.errors import ConfigError, listing
from zimage_ref.lora.trained import UpdateSize
from zimage_ref.model.config import TransformerConfig
from zimage_ref.model.parameters import (
    LORA_TARGETS,
    TARGETS,
    block_of,
    lora_modules,
    transformer_blocks,
    transformer_parameters,
)

REFINERS, ATTENTION_AND_MLP = "refiners", "attn_mlp"
PRESETS = (*TARGETS, ATTENTION_AND_MLP)
_RANGE = re.compile(r"^(layers|noise_refiner|context_refiner|\*)\.(\d+)-(\d+)(?=\.|$)")
_BLOCK = re.compile(r"^(layers|noise_refiner|context_refiner)\.(\d+)\.")
_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Target:
    """One entry of `targets`."""

    name: str  # a preset or a pattern
    rank: int | None = None
    alpha: float | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises ConfigError for an unknown preset, or a rank or alpha that is none."""
        name, equals, size = text.strip().partition("=")
        name = name.strip()
        if (preset := name.replace("-", "_")) in PRESETS:
            name = preset
        elif not re.search(r"[.*?\[]", name):
            raise ConfigError(
                f"`targets` {name!r} is unknown: known are {', '.join(PRESETS)}, and patterns such as "
                f"layers.10-20.attention.*{_meant(name, PRESETS)}"
            )
        if not equals:
            return cls(name)
        rank, slash, alpha = size.partition("/")
        if not rank.strip().isdecimal() or (slash and not _NUMBER.fullmatch(alpha.strip())):
            raise ConfigError(f"`targets` {text}: after = stands a rank, or a rank and alpha, such as {name}=32/16")
        LORA_RANK.check("targets", int(rank))
        if slash:
            TRAINING["alpha"].check("targets", float(alpha))
        return cls(name, int(rank), float(alpha) if slash else None)

    def __str__(self) -> str:
        size = "" if self.rank is None else f"={self.rank}" + ("" if self.alpha is None else f"/{self.alpha:g}")
        return self.name + size

    def size(self, common: UpdateSize) -> UpdateSize:
        """The size of a layer that this entry chooses, in a run whose own size is `common`."""
        if self.rank is None:
            return common
        alpha = common.alpha / common.rank * self.rank if self.alpha is None else self.alpha
        return replace(common, rank=self.rank, alpha=alpha)


def normalized(targets: Sequence[str]) -> tuple[str, ...]:
    """The entries in the form that is stored. Raises ConfigError; see `Target.parse`."""
    return tuple(str(Target.parse(text)) for text in targets)


def chosen_layers(
    config: TransformerConfig, targets: Sequence[str], common: UpdateSize, whole: bool = False
) -> dict[str, UpdateSize]:
    """The layers that `targets` choose and the size of each, in the order in which they run.

    whole: patterns choose among everything that has parameters, not only among Linear layers.
    Raises ConfigError if an entry chooses no layer.
    """
    entries = [Target.parse(text) for text in targets]
    presets = [entry.name for entry in entries if entry.name in TARGETS]
    of_presets = lora_modules(config, presets) if presets or not entries else []
    known = _all_modules(config) if whole else _linear_layers(config)
    sizes: dict[str, UpdateSize] = {}
    for entry in sorted(entries, key=lambda entry: entry.rank is not None):  # stable: later ones stay later
        found = _of_preset(entry.name, of_presets, known) if entry.name in PRESETS else _matches(entry.name, known)
        if not found and entry.name not in PRESETS:
            raise ConfigError(f"`targets` {entry.name}: no layer has such a name{_near(entry.name, config, known)}")
        sizes |= dict.fromkeys(found, entry.size(common))
    return {layer: sizes[layer] for layer in known if layer in sizes}


def by_module(sizes: Mapping[str, UpdateSize]) -> dict[tuple[str, int, float], list[str]]:
    """(module such as layers.*.attention.to_q, rank, alpha) -> the numbers of its blocks, for people."""
    found: dict[tuple[str, int, float], list[str]] = {}
    for layer, size in sizes.items():
        block = _BLOCK.match(layer)
        module = _without_number(layer)
        found.setdefault((module, size.rank, size.alpha), []).append(block[2] if block else "")
    return found


def ranges(numbers: Sequence[str]) -> str:
    """Ascending numbers of blocks in short: 0-2, 5."""
    runs: list[list[int]] = []
    for number in map(int, filter(None, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _linear_layers(config: TransformerConfig) -> list[str]:
    """Every Linear layer: those of the blocks in the order in which they run, then the others."""
    in_blocks = lora_modules(config, ("all",))
    weights = [name for name, shape in transformer_parameters(config).items() if len(shape) == 2]
    others = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    return [*in_blocks, *(name for name in others if name not in set(in_blocks))]


def _all_modules(config: TransformerConfig) -> list[str]:
    """Everything that has parameters: the blocks in the order in which they run, then the rest."""
    owners = list(dict.fromkeys(map(owner_of, transformer_parameters(config))))
    in_blocks = [f"{block}." for block in transformer_blocks(config)]
    ordered = [owner for block in in_blocks for owner in owners if owner.startswith(block)]
    return [*ordered, *(owner for owner in owners if not block_of(f"{owner}."))]


def owner_of(name: str) -> str:
    """The module of the parameter `name`. A parameter of the transformer itself stands for its own module."""
    return name.rpartition(".")[0] or name


def _of_preset(name: str, of_presets: Sequence[str], known: Sequence[str]) -> list[str]:
    if name == ATTENTION_AND_MLP:
        suffixes = tuple(f".{suffix}" for group in LORA_TARGETS.values() for suffix in group)
        return [layer for layer in known if layer.startswith("layers.") and layer.endswith(suffixes)]
    if name == REFINERS:
        return [layer for layer in of_presets if not layer.startswith("layers.")]
    if name in LORA_TARGETS:
        return [layer for layer in of_presets if layer.endswith(LORA_TARGETS[name])]
    return [layer for layer in of_presets if name == "all" or "adaLN" in layer]


def _matches(pattern: str, known: Sequence[str]) -> list[str]:
    numbers = _RANGE.match(pattern)
    if numbers is not None:
        pattern = f"{numbers[1]}.*{pattern[numbers.end() :]}"
    found = []
    for layer in known:
        block = _BLOCK.match(layer)
        inside = numbers is None or (block is not None and int(numbers[2]) <= int(block[2]) <= int(numbers[3]))
        if inside and (fnmatchcase(layer, pattern) or fnmatchcase(layer, f"{pattern}.*")):
            found.append(layer)
    return found


def _near(pattern: str, config: TransformerConfig, known: Sequence[str]) -> str:
    """What may be meant, in words."""
    stars = re.sub(r"^(\w+)\.\d+(-\d+)?", r"\1.*", pattern)
    if _matches(stars, known):  # the numbers of the blocks are wrong
        counts = {"layers": config.n_layers, "refiners": config.n_refiner_layers}
        return f": blocks are counted from 0: {listing(f'{n - 1} is the last of {name}' for name, n in counts.items())}"
    modules = dict.fromkeys(_without_number(layer) for layer in known)
    parts = dict.fromkeys(module.rpartition(".")[0] + ".*" for module in modules)
    return _meant(stars, [*modules, *parts, *PRESETS])


def _meant(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f": is {' or '.join(close)} meant?" if close else ""


def _without_number(layer: str) -> str:
    return _BLOCK.sub(r"\1.*.", layer)
