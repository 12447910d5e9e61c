"""Which component and dialect a checkpoint is, its config, and its weights by official name.

A file is judged by the names in it, never by its own name: the component and dialect whose names it shares most are
what it is, and then every tensor must be there, known, and of the right shape.
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
from .registry import COMPONENTS


@dataclass(frozen=True)
class Identity:
    """What a file is, judged by its names; `sizes` is a config whose sizes are read off the shapes in it."""

    component: str
    dialect: Dialect[Config]
    sizes: Config
    prefix: str  # what was before the names

    def __str__(self) -> str:
        prefix = f", prefix {self.prefix}" if self.prefix else ""
        return f"{COMPONENTS[self.component].title} ({self.dialect.name} names{prefix})"


def identify(tensors: Tensors, wanted: str | None = None) -> Identity | None:
    """The component and dialect of whose names `tensors` hold the largest share; None if a quarter at most.

    In a file of several components it is `wanted`, if that is one of them.
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
            if found > share:
                best, share = Identity(name, dialect, sizes, prefix), found
    return best


def official_weights(
    file: Checkpoint, component: AnyComponent, config: Config | None = None, identity: Identity | None = None
) -> dict[str, Tensor]:
    """Every tensor of `component` that `file` holds, by official name, in the official order.

    `config`: what the shapes must fit; None to take the sizes from the file itself. Raises WeightError for tensors
    that are missing, unknown, there twice, or of a wrong shape or dtype, and for a file of another component.
    """
    identity = identity or identify(file.tensors, component.name)
    if identity is None or identity.component != component.name:
        what = looks_like(file.tensors, identity)
        raise WeightError(f"{file.path}: holds no {component.title}: it looks like {what}")
    config = config or identity.sizes
    own, _ = _own(file.tensors, component, file.path)
    shapes, unused = component.parameters(config), component.unused(config)
    contents = _contents(component, identity.dialect, config)
    expected = {name: group[0][1].stored(shapes[group[0][0]]) for name, group in contents.items()}
    needed = {name for name, group in contents.items() if any(part not in unused for part, _ in group)}
    require(own, expected, needed, component.ignored, file.path)
    places = {part: (name, placement) for name, group in contents.items() for part, placement in group}
    return {
        part: extract(own[places[part][0]], places[part][1], shape)
        for part, shape in shapes.items()
        if places[part][0] in own
    }


@lru_cache(64)
def _contents(component: Component[ConfigT], dialect: Dialect[ConfigT], config: ConfigT) -> Contents:
    return dialect.contents(component.parameters(config), config)


def require(tensors: Tensors, expected: Shapes, needed: set[str], ignored: Iterable[str], path: Path) -> None:
    """Raises WeightError, listing every kind of misfit, unless the tensors are those expected."""
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
    """What a file seems to be, in words."""
    identity = identity or identify(tensors)
    if is_lora(tensors):
        return "a LoRA"
    if identity:
        return f"a {COMPONENTS[identity.component].family} {identity}"
    return f"something else: it holds {listing(tensors, 3) or 'no tensors'}"


def config_of(file: Checkpoint, component: Component[ConfigT], folder: Path | None = None) -> ConfigT | None:
    """The config of `file`: in its own record, else as JSON beside it or in `folder`; None if it is nowhere.

    Raises ConfigError or FormatError if what is there cannot be read.
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
        raise ConfigError(f"{beside}: is missing")
    return None


def _is_of(path: Path, component: AnyComponent) -> bool:
    """Whether the config.json beside a file is that component's: folders of single files hold foreign ones."""
    return component.config_key in read_json(path, ConfigError) or path.parent.name == component.name


def _own(tensors: Tensors, component: AnyComponent, path: Path | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of `component` without their prefix, and the prefix.

    In a file of several components those of the others are left out; otherwise a foreign name stays, to be refused.
    Raises WeightError naming `path`, if it is given, for a name that is there with and without the prefix.
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
