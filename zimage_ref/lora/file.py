"""Reads LoRA files in any of the `spellings`, and writes them in those that have a naming.

Every tensor of a file is used, or the file is refused and the error names the tensor. Fused modules (qkv) become the
official layers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zimage_ref.errors import ConfigError, WeightError, listing
from zimage_ref.formats import npz, safetensors
from zimage_ref.formats.checkpoint import WRITABLE, Checkpoint
from zimage_ref.formats.files import check_writable
from zimage_ref.formats.json_file import write_json
from zimage_ref.formats.tensors import DTYPE_NAMES, Array, Tensor, cast, float_dtype
from zimage_ref.model.parameters import Shapes, has_bias

from .alpha import PEFT_METADATA, SIDECAR, FoundAlpha, alpha_of, sidecar
from .keys import OFFICIAL_PATCH_KEY, Key, other_model, unused_kind
from .kinds import BIASES, DoRA, bias_of, update_of
from .parts import Parts, Scale
from .spellings import DEFAULT_NAMING, alpha_sources, grammar, software, spelled, spelling_of
from .updates import BIAS, LoRA, Update

# A magnitude in bfloat16 would change the length of a row of the weight by up to 0.4 %
_ALWAYS_FLOAT32 = (".alpha", *(suffix for suffix, part in DoRA.suffixes.items() if part == "magnitude"))
Modules = dict[tuple[str, ...], Parts]  # official layers -> the tensors of the module that holds them


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA, and facts about the file that it was read from."""

    path: Path
    updates: LoRA
    dialect: str  # such as "kohya (lora_unet_*.lora_down/up, fused qkv)"
    alpha_from: str  # where the strength was found
    dtype: str  # the dtype of most of the numbers in the file

    @property
    def kinds(self) -> dict[str, int]:
        """The number of updates of each kind, by the title of the kind."""
        return dict(Counter(update.title for update in self.updates.values()))

    @property
    def ranks(self) -> list[int]:
        """Every rank that occurs, ascending."""
        return sorted({r for update in self.updates.values() if (r := update.rank) is not None})

    @property
    def scales(self) -> list[float]:
        """Every effective scale (alpha / rank) that occurs, ascending."""
        return sorted({update.scale for update in self.updates.values()})

    def facts(self) -> dict[str, str]:
        """Facts about the file for people, by name."""
        return {
            "dialect": self.dialect,
            "modules": ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()),
            "rank": ", ".join(map(str, self.ranks)) or "none",
            "scale": ", ".join(f"{scale:g}" for scale in self.scales),
            "alpha from": self.alpha_from,
            "dtype": self.dtype,
        }


def read_lora(path: Path, parameters: Shapes | None = None) -> LoRAFile:
    """The LoRA in `path`, a file or a folder that holds one, for a transformer with `parameters` (None: any Z-Image).

    Raises FormatError if the file holds no tensors. Raises WeightError naming the keys that are unknown, do not fit the
    transformer, or lack their other half. Raises ConfigError if the JSON that holds its alpha is not usable.
    """
    file = Checkpoint.open(path)
    keys = _parsed(file, parameters)
    style = _main(key.style for key in keys.values() if key.style)
    prefix = next(iter(keys.values())).prefix
    alpha_from, default_scale = _alpha(file, keys, prefix, style)
    modules = _modules(file, keys, default_scale)

    single: LoRA = {}
    fused: LoRA = {}
    for layers, parts in modules.items():
        _check_layers(parts, layers, parameters)
        home = single if len(layers) == 1 else fused
        home |= _updates(parts, layers, parameters)
    for layers, parts in modules.items():
        for layer in layers if len(layers) > 1 else ():
            if layer in single and not fused[layer].same_product(single[layer]):
                raise parts.error(f"{parts.keys}: differ from the tensors of {layer} alone")
    dialect = f"{software(prefix, style)} ({prefix}*.{style}{', fused qkv' if fused else ''})"
    dtype = _main(DTYPE_NAMES[tensor.dtype] for tensor in file.tensors.values())
    return LoRAFile(file.path, {**fused, **single}, dialect, alpha_from, dtype)


def write_lora(
    path: Path,
    lora: LoRA,
    record: Mapping[str, object],
    naming: str = DEFAULT_NAMING,
    dtype: str | None = "bf16",
    with_sidecar: bool = True,
) -> None:
    """Writes `lora` in one of `lora_namings`, as .safetensors or .npz. The burn naming always gets a sidecar.

    record: facts such as rank, alpha, targets and base model, for the metadata and the sidecar. Alphas and the
    magnitudes of DoRA are float32, in any `dtype`. Raises ConfigError for an unknown naming or suffix. Raises
    WeightError if the naming has no keys for an update, or the dtype cannot hold a number.
    """
    check_output(path, naming, with_sidecar)
    if not lora:
        raise ConfigError(f"{path}: not written: the LoRA changes nothing")
    spelling = spelling_of(naming)
    arrays, extra = spelled(lora, spelling)
    facts = {**record, **extra}
    tensors = {
        name: Tensor.of(array if name.endswith(_ALWAYS_FLOAT32) else _cast(path, name, array, dtype or "f32"))
        for name, array in arrays.items()
    }
    if with_sidecar or spelling.alpha is SIDECAR:
        beside = {key: value for key, value in facts.items() if key != PEFT_METADATA}
        write_json(sidecar(path), beside)
    if path.suffix == ".npz":
        npz.write(path, tensors, {"model_type": "lora", **facts})
    else:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
        safetensors.write(path, tensors, {"format": "pt", **texts})


def check_output(path: Path, naming: str, with_sidecar: bool) -> None:
    """Raises ConfigError if a LoRA, with its sidecar if it gets one, cannot be written to `path`."""
    if path.suffix not in WRITABLE:
        raise ConfigError(f"{path}: a LoRA is written as {' or '.join(reversed(WRITABLE))}")
    beside = with_sidecar or spelling_of(naming).alpha is SIDECAR
    check_writable(path, *([sidecar(path)] if beside else ()))


def _cast(path: Path, name: str, array: Array, dtype: str) -> Array:
    result = cast(array, float_dtype(dtype))
    if not np.isfinite(cast(result, array.dtype)).all():
        raise WeightError(f"{path}: {name} does not fit in {dtype}: choose bf16 or f32")
    return result


def _alpha(file: Checkpoint, keys: Mapping[str, Key], prefix: str, style: str) -> FoundAlpha:
    """The place that alpha comes from, and the scale of modules without an alpha key."""
    if any(key.part == "alpha" for key in keys.values()):
        return "alpha keys", lambda module, rank: 1.0
    return alpha_of(file.path, file.metadata, alpha_sources(prefix, style))


def _updates(parts: Parts, layers: tuple[str, ...], parameters: Shapes | None) -> LoRA:
    """The updates that one module makes, by layer."""
    found: LoRA = {}
    bias = bias_of(parts)
    if bias is not None:
        name = layers[0] + BIAS
        found[name] = bias
        if parameters is not None and bias.shape != parameters[name]:
            raise parts.error(f"{_bias_keys(parts)} {bias.shape} does not fit {name} {parameters[name]}")
    update = update_of(parts)
    if update is not None:
        if parameters is not None:
            _check_shape(parts, layers, update, parameters)
        if update.shape[0] % len(layers):
            raise parts.error(
                f"{parts.module} has {update.shape[0]} rows, which do not divide into {len(layers)} layers"
            )
        found |= zip(layers, update.split(len(layers)), strict=True)
    return found


def _parsed(file: Checkpoint, parameters: Shapes | None) -> dict[str, Key]:
    """The meaning of every key of the file. Raises WeightError if a key is unknown."""
    names = (name.split(".")[1] for name in parameters or () if name.startswith("all_x_embedder."))
    patch_key = next(names, OFFICIAL_PATCH_KEY)
    known_keys = grammar(patch_key)
    keys = {name: known_keys.parse(name) for name in file.tensors}
    unknown = [name for name, key in keys.items() if key is None]
    for name in unknown:
        if kind := unused_kind(name):
            raise WeightError(f"{file.path}: {name} is {kind}, which Z-Image's layers cannot use")
    if unknown or not keys:
        other = next(filter(None, map(other_model, unknown)), "")
        hint = f" (they look like those of {other})" if other else ""
        fact = f"holds keys that no Z-Image LoRA has{hint}: {listing(unknown)}" if unknown else "holds no tensors"
        raise WeightError(f"{file.path}: {fact}")
    known = {name: key for name, key in keys.items() if key is not None}
    prefix = _main(key.prefix for key in known.values())
    strays = [name for name, key in known.items() if key.prefix != prefix]
    if strays:
        raise WeightError(
            f"{file.path}: most keys start with {prefix or 'the name of a layer'!r}, not {listing(strays)}"
        )
    return known


def _modules(file: Checkpoint, keys: Mapping[str, Key], default_scale: Scale) -> Modules:
    """The tensors by module. If a module is there twice, in two spellings, both must be equal."""
    found: dict[tuple[str, ...], dict[str, tuple[str, Tensor]]] = {}
    names: dict[tuple[str, ...], str] = {}
    for name, key in keys.items():
        parts = found.setdefault(key.layers, {})
        names.setdefault(key.layers, key.module)
        first = parts.setdefault(key.part, (name, file.tensors[name]))
        if first[0] != name and not np.array_equal(first[1].read(), file.tensors[name].read()):
            raise WeightError(f"{file.path}: {first[0]} and {name} are for the same layer, and differ")
    return {
        layers: Parts(file.path, names[layers], parts, len(layers), default_scale) for layers, parts in found.items()
    }


def _check_layers(parts: Parts, layers: tuple[str, ...], parameters: Shapes | None) -> None:
    """Raises WeightError unless the transformer has every parameter that the module changes.

    An update of a bias must be for a single layer that has a bias.
    """
    changes_bias = bool(BIASES & parts.tensors.keys())
    if changes_bias and (len(layers) > 1 or not has_bias(layers[0])):
        raise parts.error(f"{_bias_keys(parts)} is for a layer without a bias")
    for kind in ("weight", "bias") if parameters is not None else ():
        changing = [part for part in parts.tensors if (part in BIASES) == (kind == "bias")]
        absent = [layer for layer in layers if f"{layer}.{kind}" not in (parameters or {})]
        if changing and absent:
            keys = listing(parts.key(part) for part in changing)
            raise parts.error(f"{keys}: this transformer has no {listing(f'{layer}.{kind}' for layer in absent)}")


def _bias_keys(parts: Parts) -> str:
    return listing(parts.key(part) for part in sorted(BIASES & parts.tensors.keys()))


def _check_shape(parts: Parts, layers: tuple[str, ...], update: Update, parameters: Shapes) -> None:
    shapes = [parameters[f"{layer}.weight"] for layer in layers]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if update.shape != expected:
        facts = listing(f"{key} {tensor.shape}" for key, tensor in parts.tensors.values())
        raise parts.error(f"{facts}: does not fit {parts.module} {expected}")


def _main(values: Iterable[str]) -> str:
    """The most frequent of the values, '' if there are none."""
    return next((value for value, _ in Counter(values).most_common(1)), "")
