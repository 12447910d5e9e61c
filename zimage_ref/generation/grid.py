"""A grid of pictures that differ in one or two options, and the sheet that shows them side by side.

    grid = Grid.parse("lora=0,0.5,1 seed=1,2,3", [GenerateConfig("a fox")])
    sheet = Sheet(grid.columns, grid.rows, size=(512, 512))
    for made in run.make(run.plan(grid.configs)):
        sheet.add(grid.cells[made.index], made.picture)

The first axis goes from left to right, the second from top to bottom. An axis is a number or a named choice of
GenerateConfig. The axis `lora` is `lora_scale`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import get_args, get_type_hints

import numpy as np

from zimage_ref.bounds import COUNT
from zimage_ref.errors import ConfigError
from zimage_ref.options import choices_of
from zimage_ref.options_file import typed

from .config import GenerateConfig

_SHORT = {"lora": "lora_scale"}  # an axis that has a shorter name than its field
_FORM = "give one or two axes as NAME=VALUE,VALUE,..., such as lora=0,0.5,1 seed=1,2,3"


@dataclass(frozen=True)
class Axis:
    """An option and the values that it takes along one side of a grid."""

    field: str  # of GenerateConfig
    values: tuple[object, ...]
    texts: tuple[str, ...]  # the values as the user wrote them, with the name of the axis

    @classmethod
    def parse(cls, text: str) -> Axis:
        """The axis of NAME=VALUE,VALUE,... Raises ConfigError naming `grid`."""
        name, equals, listed = text.partition("=")
        words = [word.strip() for word in listed.split(",")]
        if not equals or not all(words):
            raise ConfigError(f"`grid` {text!r}: {_FORM}")
        field = _SHORT.get(name, name.replace("-", "_"))
        if field not in axes():
            near = difflib.get_close_matches(name, [*_SHORT, *axes()], 1)
            raise ConfigError(
                f"`grid` {name!r} is not an axis" + (f": is {near[0]!r} meant?" if near else f": {_FORM}")
            )
        hint = get_type_hints(GenerateConfig)[field]
        values = tuple(typed(word, hint, f"`grid` {name}") for word in words)
        if len(set(values)) < len(values):
            raise ConfigError(f"`grid` {text!r} names a value twice")
        return cls(field, values, tuple(f"{name} {word}" for word in words))


def axes() -> list[str]:
    """The fields of GenerateConfig that can be an axis: numbers, and options with named choices."""
    hints = get_type_hints(GenerateConfig)
    numbers = {name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)}}
    return [field.name for field in fields(GenerateConfig) if field.name in numbers or choices_of(field)]


@dataclass(frozen=True)
class Grid:
    """The cells of a grid, in the order in which they are made, and the labels of its sides.

    Pictures that can share a batch or a merged LoRA follow each other: if the columns are no seeds, column by column.
    """

    columns: tuple[str, ...]  # labels from left to right
    rows: tuple[str, ...]  # labels from top to bottom; one empty label if there is only one row
    configs: tuple[GenerateConfig, ...]  # len(rows) * len(columns)
    cells: tuple[int, ...]  # the place of each config, counted from 0, row by row

    @classmethod
    def parse(cls, text: str, configs: Sequence[GenerateConfig]) -> Grid:
        """The grid that `text` describes, such as "lora=0,0.5,1 seed=1,2,3".

        configs: the pictures to vary. Several of them become the rows; then `text` names one axis.
        Raises ConfigError for an unknown axis, values out of bounds, and too many cells.
        """
        parts = text.split()
        if not 1 <= len(parts) <= 2:
            raise ConfigError(f"`grid` {text!r}: {_FORM}")
        across, *rest = map(Axis.parse, parts)
        fixed = {axis.field for axis in (across, *rest)}
        if len(fixed) <= len(rest):
            raise ConfigError(f"`grid` {text!r} names {across.field} twice")
        if rest and len(configs) > 1:
            raise ConfigError(f"`grid` with two axes takes one prompt and one seed, not {len(configs)} pictures")
        if rest:
            (down,) = rest
            bases = [_set(configs[0], down, value) for value in down.values]
            rows = down.texts
        else:
            bases, rows = list(configs), _row_labels(configs)
        COUNT.check("grid", len(bases) * len(across.values))
        cells = tuple(_set(base, across, value) for base in bases for value in across.values)
        if "seed" in fixed and len({config.seed for config in configs}) > 1:
            raise ConfigError(f"`grid` {text!r} has an axis of seeds: give no more seeds beside it")
        places = np.arange(len(cells)).reshape(len(bases), len(across.values))
        order = tuple(int(place) for place in (places if across.field == "seed" else places.T).ravel())
        return cls(across.texts, rows, tuple(cells[place] for place in order), order)


def _set(config: GenerateConfig, axis: Axis, value: object) -> GenerateConfig:
    return replace(config, **{axis.field: value})  # type: ignore[arg-type]


def _row_labels(configs: Sequence[GenerateConfig]) -> tuple[str, ...]:
    """The prompts, or the seeds, or both: whatever tells `configs` apart."""
    if len(configs) == 1:
        return ("",)
    prompts, seeds = ({getattr(config, name) for config in configs} for name in ("prompt", "seed"))
    parts = [
        ([config.prompt] if len(prompts) > 1 else []) + ([f"seed {config.seed}"] if len(seeds) > 1 else [])
        for config in configs
    ]
    return tuple(", ".join(part) for part in parts)
