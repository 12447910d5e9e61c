"""Identifies the component and the dialect of a checkpoint; gives its config and its weights by official name.

The names of the tensors decide, never the name of the file. The checkpoint is of the component and dialect that share
most of these names. Then every tensor must be there, be known, and have the right shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from zimage_ref.errors import ConfigError, FormatError, WeightError, listing
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.json_file import read_json
from zimage_ref.formats.tensors import DTYPE_NAMES, FLOATS, Tensor, Tensors
from zimage_ref.lora.spellings import is_lora
from zimage_ref.model.config_reader import Config, parse_config
from zimage_ref.model.parameters import Shapes

from .component import CONFIG_FILE, AnyComponent, Component, ConfigT
from .dialects import Contents, Dialect, extract
from .passengers import passengers
from .registry import COMPONENTS

_SHAPES = 1e-3  # what shapes count beside names


@dataclass(frozen=True)
class Identity:
    """The identity of a file, found by the names of its tensors. `sizes` is a config with the sizes of its shapes."""

    component: str
    dialect: Dialect[Config]
    sizes: Config
    prefix: str  # the text before each name in the file

    def __str__(self) -> str:
        prefix = f", prefix {self.prefix}" if self.prefix else ""
        component = COMPONENTS[self.component]
        variant = component.variant(self.sizes)
        return f"{component.title}{variant and f' {variant}'} ({self.dialect.name} names{prefix})"


def identify(tensors: Tensors, wanted: str | None = None) -> Identity | None:
    """The component and the dialect with the largest share of names among `tensors`. None if it is a quarter or less.

    If a file holds several components and `wanted` is one of them, it is `wanted`.
    """
    best, share = None, 0.25
    for name in sorted(COMPONENTS, key=lambda name: name != wanted):
        if best and best.component == wanted:
            break
        component = COMPONENTS[name]
        own, prefix = _own(tensors, component)
        for dialect in component.dialects:
            sizes = component.sizes_of(dialect, own)
            contents = _contents(component, dialect, sizes)
            found = len(contents.keys() & own.keys()) / len(contents)
            if found > 0.25:
                found += _SHAPES * _fitting(own, contents, component.parameters(sizes))
            if found > share:
                best, share = Identity(name, dialect, sizes, prefix), found
    return best


def _fitting(own: Tensors, contents: Contents, shapes: Shapes) -> float:
    """The share of tensors that have the shapes of `contents`: dialects may have the same names."""
    first = {name: group[0] for name, group in contents.items() if name in own}
    return sum(own[name].shape == how.stored(shapes[part]) for name, (part, how) in first.items()) / len(contents)


def official_weights(
    file: Checkpoint, component: AnyComponent, config: Config | None = None, identity: Identity | None = None
) -> dict[str, Tensor]:
    """The tensors of `component` in `file` by official name, in the official order.

    config: the shapes must fit it. None: the sizes come from the file itself. Raises WeightError if a tensor is
    missing, unknown, there twice, or has a wrong shape or dtype, and if the file is of another component.
    """
    identity = identity or identify(file.tensors, component.name)
    if identity is None or identity.component != component.name:
        what = looks_like(file.tensors, identity)
        raise WeightError(f"{file.path}: holds no {component.title}: it looks like {what}")
    config = config or identity.sizes
    own, _ = _own(file.tensors, component, file.path)
    useless = set(passengers(own))
    own = {name: tensor for name, tensor in own.items() if name not in useless}
    shapes, unused = component.parameters(config), component.unused(config)
    contents = _contents(component, identity.dialect, config)
    expected = {name: group[0][1].stored(shapes[group[0][0]]) for name, group in contents.items()}
    needed = {name for name, group in contents.items() if any(part not in unused for part, _ in group)}
    own = {name: _fitted(file, tensor, expected.get(name, tensor.shape)) for name, tensor in own.items()}
    require(own, expected, needed, component.ignored, file.path)
    places = {part: (name, placement) for name, group in contents.items() for part, placement in group}
    return {
        part: extract(own[places[part][0]], places[part][1], shape)
        for part, shape in shapes.items()
        if places[part][0] in own
    }


def ignored_in(file: Checkpoint, component: AnyComponent) -> list[str]:
    """The names in `file` that are not read: copies, tables, and tensors that other programs left there."""
    own, prefix = _own(file.tensors, component)
    return passengers(file.tensors) + [f"{prefix}{name}" for name in component.ignored if name in own]


def _fitted(file: Checkpoint, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` as one of `shape`, if its file leaves a choice: GGUF has no leading axes of length 1."""
    dropped = len(shape) - len(tensor.shape)
    if file.container == "gguf" and dropped > 0 and shape == (1,) * dropped + tensor.shape:
        return tensor.view(shape, lambda array: array.reshape(shape))
    return tensor.fitted(shape)


@lru_cache(64)
def _contents(component: Component[ConfigT], dialect: Dialect[ConfigT], config: ConfigT) -> Contents:
    return dialect.contents(component.parameters(config), config)


def require(tensors: Tensors, expected: Shapes, needed: set[str], ignored: Iterable[str], path: Path) -> None:
    """Raises WeightError unless the tensors are the expected ones. The error lists every kind of difference."""
    faults = {
        "missing": [name for name in expected if name in needed and name not in tensors],
        "unknown": [name for name in tensors if name not in expected and name not in ignored],
        "wrongly shaped": [
            f"{name} {tensor.shape} instead of {expected[name]}"
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name]
        ],
        "not of floating point": [
            f"{name} {tensor.stored_as}"
            for name, tensor in tensors.items()
            if name in expected and DTYPE_NAMES.get(tensor.dtype) not in FLOATS
        ],
    }
    if any(faults.values()):
        facts = "; ".join(f"{len(v)} {kind}: {listing(v)}" for kind, v in faults.items() if v)
        raise WeightError(f"{path}: does not fit the model ({len(expected)} tensors): {facts}")


def looks_like(tensors: Tensors, identity: Identity | None = None) -> str:
    """A description, for people, of what a file seems to hold."""
    identity = identity or identify(tensors)
    if is_lora(tensors):
        return "a LoRA"
    if identity:
        return f"a {COMPONENTS[identity.component].family} {identity}"
    return f"something else: it holds {listing(tensors, 3) or 'no tensors'}"


def config_of(file: Checkpoint, component: Component[ConfigT], folder: Path | None = None) -> ConfigT | None:
    """The config of `file`: from its record, else from JSON beside it or in `folder`. None if there is none.

    Raises ConfigError or FormatError if there is one that cannot be read.
    """
    kind = type(component.official)
    own = file.record.get("config")
    if own is not None:
        if not isinstance(own, Mapping):
            raise FormatError(f"{file.path}: its record has a config that is no JSON object")
        return parse_config(kind, own, str(file.path))
    beside = file.path.parent / CONFIG_FILE
    places = [beside, *([folder / component.name / CONFIG_FILE] if folder else [])]
    for path in places:
        if path.is_file() and (path != beside or _is_of(path, component)):
            return parse_config(kind, read_json(path, ConfigError), str(path))
    if file.path.parent.name == component.name and folder and file.path.parent.parent == folder:
        identity = identify(file.tensors, component.name)
        if "quantization_level" in file.metadata and identity and identity.component == component.name:
            return component.own_config(identity.sizes)  # mflux-save writes no config.json
        raise ConfigError(f"{beside}: is missing")
    return None


def _is_of(path: Path, component: AnyComponent) -> bool:
    """Whether the config.json at `path` is of `component`. In a folder of single files it may be of another model."""
    return component.config_key in read_json(path, ConfigError) or path.parent.name == component.name


def _own(tensors: Tensors, component: AnyComponent, path: Path | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of `component` without their prefix, and the prefix.

    If a file holds several components, the tensors of the others are left out. Otherwise unknown names stay, so that
    they are refused later. If `path` is given, raises WeightError naming it for a name with and without the prefix.
    """
    known = sorted(((prefix, c) for c in COMPONENTS.values() for prefix in c.prefixes), key=lambda p: -len(p[0]))
    owners = {name: next(((p, c) for p, c in known if name.startswith(p)), ("", component)) for name in tensors}
    prefixes = [prefix for prefix, owner in owners.values() if owner is component and prefix]
    own: dict[str, Tensor] = {}
    for name, (prefix, owner) in owners.items():
        if owner is component:
            short = name.removeprefix(prefix)
        elif prefixes:
            continue
        else:
            short = name
        if short in own and path:
            raise WeightError(f"{path}: {short} is there twice, with and without the prefix {prefixes[0]}")
        own[short] = tensors[name]
    return own, prefixes[0] if prefixes else ""
