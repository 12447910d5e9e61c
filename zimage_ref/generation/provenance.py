"""Records how a picture was made, and reads the record again to repeat the picture.

A record holds the paths that the user gave, and digests that show later whether a file has changed. The digest of a
LoRA or a picture is its SHA-256. The digest of a model is that of the first elements of every tensor: this takes a
moment, while reading the whole model would take a minute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar, get_type_hints

from zimage_ref.checkpoints.control_file import control_fingerprint
from zimage_ref.checkpoints.fingerprint import model_fingerprint
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.checkpoints.registry import part_options
from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats.checkpoint import find_weights
from zimage_ref.formats.files import sha256
from zimage_ref.formats.quantize import GROUP_SIZE
from zimage_ref.options_file import typed
from zimage_ref.pictures.metadata import read_record

from .config import GenerateConfig, config_of
from .control_options import CONTROL_FIELDS, control_and_scale

_DIGITS = 16  # the digits of a SHA-256 that a record holds
_PICTURES = ("init_image", "mask", "control_image")
# options that records of earlier versions do not have -> what those pictures were made with
_LATE = {field.name: field.default for field in fields(GenerateConfig) if field.metadata.get("late")}
T = TypeVar("T")


@dataclass(frozen=True)
class RecordedLoRA:
    """A LoRA as it is in a record."""

    path: Path  # as the user named it
    scale: float
    sha256: str  # its `digest`


@dataclass(frozen=True)
class ModelChoice:
    """The model to open, and how. For None and missing parts, the engine and the folder of the model decide."""

    model: str | Path | None = None  # a folder, or the id of a repository
    backend: str | None = None
    dtype: str | None = None
    quantize: int | None = None
    parts: Mapping[str, Path] = field(default_factory=dict)  # files to use instead of those in the folder
    group_size: int | None = None  # weights that share one scale; None is GROUP_SIZE

    def otherwise(self, recorded: ModelChoice, dtypes: Sequence[str]) -> ModelChoice:
        """This choice, with its open fields from `recorded`. A recorded dtype counts only if it is in `dtypes`."""
        return ModelChoice(
            model=self.model or recorded.model,
            backend=self.backend or recorded.backend,
            dtype=self.dtype or (recorded.dtype if recorded.dtype in dtypes else None),
            quantize=self.quantize or recorded.quantize,
            parts={**recorded.parts, **self.parts},
            group_size=self.group_size or (None if self.quantize else recorded.group_size),
        )

    def facts(self) -> dict[str, object]:
        """The fields of a record for this choice, except the model."""
        parts = {name: str(self.parts[name]) for name in part_options() if name in self.parts}
        group_size = self.group_size if self.group_size != GROUP_SIZE else None
        bits = {"quantize": self.quantize, "group_size": group_size if self.quantize else None}
        return {"backend": self.backend, "dtype": self.dtype, **bits, **parts}


class Recorder:
    """Makes the records of pictures from one model and its LoRAs. It hashes each file once."""

    def __init__(self, facts: Mapping[str, object], loras: Sequence[RecordedLoRA] = ()) -> None:
        """facts: those of `identity`, `ModelChoice.facts` and the like. Values that are None are left out."""
        self._facts = {name: fact for name, fact in facts.items() if fact is not None}
        self._loras = tuple(loras)
        self._digests: dict[Path, str] = {}  # digests of pictures

    def record(self, config: GenerateConfig, digests: Mapping[str, str] | None = None) -> dict[str, object]:
        """The record of a picture, as flat JSON.

        digests: SHA-256 of the files that were used, by field; without them, the files are read again. Raises
        FormatError if one cannot be read.
        """
        known = {name: value[:_DIGITS] for name, value in (digests or {}).items() if value}
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        files, factor = {name: values.pop(name) for name in _PICTURES}, values.pop("lora_scale")
        if config.control is None:
            values = {name: value for name, value in values.items() if name not in CONTROL_FIELDS}
        made: dict[str, object] = {
            name: value for name, value in values.items() if value not in (None, ()) and value != _LATE.get(name)
        }
        for name, source in files.items():
            if isinstance(source, (str, Path)):
                made |= {name: str(source), f"{name}_sha256": known.get(name) or self._digest(Path(source))}
        if "control" in known:
            made["control_fingerprint"] = known["control"]
        return made | {"loras": self._scaled(factor)} | self._facts

    def _scaled(self, factor: float) -> list[dict[str, object]]:
        """The LoRAs with the scales that they have in a picture."""
        return [{"file": str(lora.path), "scale": lora.scale * factor, "sha256": lora.sha256} for lora in self._loras]

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = digest(path)
        return self._digests[path]


def identity(model: ModelFolder) -> dict[str, str]:
    """The folder of a model, and its fingerprint from names, shapes and first elements of its tensors."""
    return {"model": str(model.path), "model_fingerprint": model_fingerprint(model)[:_DIGITS]}


def digest(path: Path) -> str:
    """The first digits of the SHA-256 of a file. For a folder, of the weights in it.

    Raises FormatError if the file cannot be read.
    """
    return sha256(find_weights(path) if path.is_dir() else path)[:_DIGITS]


@dataclass(frozen=True)
class Repeat:
    """The content of a record, to make its picture again."""

    options: dict[str, object]  # fields of GenerateConfig
    choice: ModelChoice
    loras: list[RecordedLoRA]
    hashes: dict[str, str]  # of model and pictures: model_fingerprint, init_image_sha256, mask_sha256
    source: Path  # the picture that holds the record

    @classmethod
    def read(cls, path: Path) -> Repeat:
        """Reads the record in the picture `path`. Raises ConfigError or FormatError if it is not complete."""
        return cls.of(read_record(path), path)

    @classmethod
    def of(cls, record: Mapping[str, object], source: Path) -> Repeat:
        """Reads a record. Raises ConfigError or FormatError naming `source` if it is not complete."""

        def known(name: str, hint: type[T]) -> T | None:
            value: T | None = None if record.get(name) is None else typed(record[name], hint, f"{source}: {name}")
            return value

        try:
            loras = _recorded_loras(record["loras"])
            options = {name: known(name, hint) for name, hint in get_type_hints(GenerateConfig).items()}
            if options["prompt"] is None or record.get("model") is None:
                raise KeyError("prompt and model")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{source}: its metadata cannot be understood: {error!r}") from error
        parts = {name: known(name, Path) for name in part_options()}
        choice = ModelChoice(
            model=str(record["model"]),
            backend=known("backend", str),
            dtype=known("dtype", str),
            quantize=known("quantize", int),
            group_size=known("group_size", int),
            parts={name: path for name, path in parts.items() if path is not None},
        )
        options = {name: value for name, value in options.items() if value is not None}
        hashes = {k: str(v) for k, v in record.items() if k.endswith(("_sha256", "_fingerprint"))}
        return cls(options, choice, loras, hashes, source)

    def config(self, **changes: object) -> GenerateConfig:
        """The config of the picture with `changes`.

        Raises ConfigError for values out of bounds. It names the picture if the value is the record's.
        """
        try:
            return config_of(self.options | changes)
        except ConfigError as error:
            named = re.match(r"`(\w+)`", str(error))
            if named is None or named[1] in changes:
                raise
            raise ConfigError(f"{self.source}: {error}") from error

    def changes(self, model: Mapping[str, str], loras: Iterable[RecordedLoRA]) -> list[str]:
        """The files that differ from those that the picture was made from. model: an `identity`. loras: those in use.

        Raises FormatError if a picture cannot be read.
        """
        found = []
        if model["model_fingerprint"] != self.hashes.get("model_fingerprint"):
            found.append(model["model"])
        before = {lora.sha256 for lora in self.loras}
        found += [str(lora.path) for lora in loras if lora.sha256 not in before]
        network = self.hashes.get("control_fingerprint")
        if network and "control" in self.options:
            path, _ = control_and_scale(str(self.options["control"]))
            found += [str(path)] if control_fingerprint(path)[:_DIGITS] != network else []
        pictures = {name: str(self.options[name]) for name in _PICTURES if name in self.options}
        return found + [p for name, p in pictures.items() if digest(Path(p)) != self.hashes.get(f"{name}_sha256")]


def _recorded_loras(loras: object) -> list[RecordedLoRA]:
    """The LoRAs of a record. Raises KeyError, TypeError, ValueError or OverflowError if they have a wrong form."""
    if not isinstance(loras, list) or not all(isinstance(lora, dict) for lora in loras):
        raise TypeError("loras is not a list of objects")
    return [
        RecordedLoRA(typed(lora["file"], Path, "loras"), float(lora["scale"]), str(lora["sha256"])) for lora in loras
    ]
