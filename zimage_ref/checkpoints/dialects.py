"""Dialects: how a program names and lays out the weights of a network, and how to convert in both directions.

A dialect is one function from an official name to a Placement. Reading and writing both follow from it.
The dialects of a network are in its own file: `transformer`, `text_encoder`, `vae`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array, Tensor, Tensors
from zimage_ref.model.parameters import Shapes

Shape = tuple[int, ...]
LINEAR_RANK, CONVOLUTION_RANK = 2, 4
_AnyConfig = TypeVar("_AnyConfig", contravariant=True)


@dataclass(frozen=True)
class Placement:
    """The place and the form in which a dialect stores one official tensor."""

    name: str
    part: int = 0  # the index of its block of rows in a fused matrix
    parts: int = 1  # the number of blocks of the fused matrix, all of one size
    transposed: bool = False  # stored as (in, out)
    spatial: bool = False  # a matrix stored as a 1x1 convolution, (out, in, 1, 1)
    channels_last: bool = False  # a convolution stored as (out, kh, kw, in)

    @property
    def same(self) -> bool:
        """Whether the stored data equals that of the official tensor."""
        return self == Placement(self.name)

    def stored(self, shape: Shape) -> Shape:
        """The shape that the dialect stores for an official tensor of `shape`, with all `parts` if it is fused."""
        if self.channels_last:
            return (shape[0], *shape[2:], shape[1])
        rows = (shape[0] * self.parts, *shape[1:]) if self.parts > 1 else shape
        return rows[::-1] if self.transposed else (*rows, 1, 1) if self.spatial else rows

    def official(self, stored: Shape) -> Shape:
        """The inverse of `stored`."""
        if self.channels_last:
            return (stored[0], stored[-1], *stored[1:-1])
        rows = stored[::-1] if self.transposed else stored[:2] if self.spatial else stored
        return (rows[0] // self.parts, *rows[1:]) if self.parts > 1 else rows


@dataclass(frozen=True)
class FileStyle:
    """How a program names the files of one network in a folder, and what it records in them."""

    stem: str  # of the index
    shard: Callable[[int, int], str]  # number from 0, count -> the name of a file
    shard_size: int  # bytes
    metadata: Callable[[int | None], dict[str, str]]  # bits of the weights, None if they are not quantized


# name of a tensor in a file -> the official tensors that it holds
Contents = Mapping[str, Sequence[tuple[str, Placement]]]


@dataclass(frozen=True)
class Dialect(Generic[_AnyConfig]):
    """One way to name and lay out a network's weights."""

    name: str
    place: Callable[[str, Shape, _AnyConfig], Placement]  # official name, its shape, the network's config
    whole: bool = False  # whether matrices are stored as they are, so that they may be quantized
    files: FileStyle | None = None  # how its program names the files of a folder; None: as Hugging Face

    def contents(self, shapes: Shapes, config: _AnyConfig) -> Contents:
        """The contents of a file in this dialect that holds a model with the parameters `shapes`."""
        contents: dict[str, list[tuple[str, Placement]]] = {}
        for name, shape in shapes.items():
            placement = self.place(name, shape, config)
            contents.setdefault(placement.name, []).append((name, placement))
        return contents

    def write(self, tensors: Tensors, config: _AnyConfig) -> dict[str, Tensor]:
        """Official tensors in this dialect: all of a model, or some of them. Fused matrices need all their parts."""
        contents = self.contents({name: tensor.shape for name, tensor in tensors.items()}, config)
        return {name: _joined([(tensors[part], how) for part, how in group]) for name, group in contents.items()}

    def official_shape(self, tensors: Tensors, name: str, rank: int, config: _AnyConfig) -> Shape:
        """The official shape, of `rank` axes, of one tensor in a file. Raises ConfigError if there is none."""
        placement = self.place(name, (0,) * rank, config)
        tensor = tensors.get(placement.name)
        if tensor is None or len(tensor.shape) != len(placement.stored((0,) * rank)) or 0 in tensor.shape:
            raise ConfigError(f"{placement.name} does not show its size")
        return placement.official(tensor.shape)


def extract(stored: Tensor, placement: Placement, shape: Shape) -> Tensor:
    """The official tensor of `shape` inside the stored tensor `stored`."""
    if placement.same:
        return stored

    start, stop = placement.part * shape[0], (placement.part + 1) * shape[0]
    if placement == Placement(placement.name, placement.part, placement.parts):  # rows as they are
        return stored.block(start, stop)

    def take(array: Array) -> Array:
        if placement.channels_last:
            return np.moveaxis(array, -1, 1)
        rows = array.T if placement.transposed else array
        return rows[start:stop].reshape(shape)

    return stored.view(shape, take)


def _joined(parts: Sequence[tuple[Tensor, Placement]]) -> Tensor:
    """The tensor that a file stores for the official tensors in `parts`."""
    first, placement = parts[0]
    if placement.same:
        return first
    ordered = [tensor for tensor, _ in sorted(parts, key=lambda part: part[1].part)]

    def join() -> Array:
        if placement.channels_last:
            return np.moveaxis(first.read(), 1, -1)
        rows = np.concatenate([t.read() for t in ordered]) if len(ordered) > 1 else ordered[0].read()
        return rows.T if placement.transposed else rows.reshape(placement.stored(first.shape))

    return Tensor(placement.stored(first.shape), first.dtype, join)


def renamed(name: str, rules: Mapping[str, str]) -> str:
    """`name` after all `rules` in order. A rule is a regular expression and its replacement."""
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def _official_place(name: str, shape: Shape, config: object) -> Placement:
    return Placement(name)


OFFICIAL: Dialect[object] = Dialect("diffusers", _official_place, whole=True)  # the names of `model.parameters`
