"""Parts of a module by name: found, replaced, put in place. Only what is named is gone through, not the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .parameters import Parameters


def find(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`, such as layers.0.attention.to_out.0; "" is `model` itself."""
    return cast(nn.Module, _part(model, name))


def _part(model: nn.Module, name: str) -> object:
    """The module, list or dict of modules, or parameter called `name`."""
    part: object = model
    for key in name.split(".") if name else ():
        if isinstance(part, list):
            part = part[int(key)]
        else:
            assert isinstance(part, dict)  # modules are dicts, too
            part = part[key]
    return part


def replace(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Puts each named module in its place in the tree."""
    model.update_modules(tree_unflatten(list(modules)))


def place(model: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Puts arrays in the places of parameters, by name."""
    for name, array in arrays.items():
        path, _, parameter = name.rpartition(".")
        find(model, path)[parameter] = array


@contextmanager
def substituted(model: nn.Module, arrays: Mapping[str, mx.array]) -> Iterator[None]:
    """`model` with other arrays as the parameters of these names, until the block ends."""
    own = {name: cast(mx.array, _part(model, name)) for name in arrays}
    place(model, arrays)
    try:
        yield
    finally:
        place(model, own)


def trainable(model: nn.Module, owners: Iterable[str]) -> Parameters:
    """The trainable parameters of the modules called `owners`, and of those below them, by name.

    An owner may also be a parameter.
    """
    found: Parameters = {}
    for owner in owners:
        if isinstance(part := _part(model, owner), mx.array):
            path, _, key = owner.rpartition(".")
            if nn.Module.trainable_parameter_filter(find(model, path), key, part):
                found[owner] = part
            continue
        modules = tree_flatten(part, f".{owner}", is_leaf=lambda part: isinstance(part, nn.Module))
        for name, module in dict(modules).items():
            found |= dict(tree_flatten(module.trainable_parameters(), f".{name}"))
    return found
