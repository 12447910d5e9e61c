"""What a picture was made from: the record that goes into it, and the way back from there.

Files are named as the user named them, and known again by what they hold: a LoRA or a picture by its SHA-256, a model
by that of the first bytes of every tensor, which takes a moment; reading all of it would take a minute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar, get_type_hints

from zimage_ref.checkpoints.fingerprint import model_fingerprint
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.checkpoints.registry import part_options
from zimage_ref.errors import FormatError
from zimage_ref.formats.checkpoint import find_weights
from zimage_ref.formats.files import sha256
from zimage_ref.options_file import typed
from zimage_ref.pictures.metadata import read_record

from .config import GenerateConfig, config_of

_DIGITS = 16  # of a SHA-256
_PICTURES = ("init_image", "mask")
T = TypeVar("T")


@dataclass(frozen=True)
class RecordedLoRA:
    """A LoRA as a record names it."""

    path: Path  # as the user named it
    scale: float
    sha256: str  # its `digest`


@dataclass(frozen=True)
class ModelChoice:
    """Which model is opened, and how. None and absent parts are left to the engine and to the model's folder."""

    model: str | Path | None = None  # folder, or a repository's id
    backend: str | None = None
    dtype: str | None = None
    quantize: int | None = None
    parts: Mapping[str, Path] = field(default_factory=dict)  # files that stand in for those of the folder

    def otherwise(self, recorded: ModelChoice, dtypes: Sequence[str]) -> ModelChoice:
        """This choice, and what it leaves open as it was `recorded`, a dtype only if the engine's `dtypes` have it."""
        return ModelChoice(
            model=self.model or recorded.model,
            backend=self.backend or recorded.backend,
            dtype=self.dtype or (recorded.dtype if recorded.dtype in dtypes else None),
            quantize=self.quantize or recorded.quantize,
            parts={**recorded.parts, **self.parts},
        )

    def facts(self) -> dict[str, object]:
        """What a record says of it, without the model."""
        parts = {name: str(self.parts[name]) for name in part_options() if name in self.parts}
        return {"backend": self.backend, "dtype": self.dtype, "quantize": self.quantize, **parts}


class Recorder:
    """Writes down how pictures of one model and its LoRAs were made. No file is hashed twice."""

    def __init__(self, facts: Mapping[str, object], loras: Sequence[RecordedLoRA] = ()) -> None:
        """facts: of `identity`, `ModelChoice.facts` and the like; None is left out."""
        self._facts = {name: fact for name, fact in facts.items() if fact is not None}
        self._loras = [{"file": str(lora.path), "scale": lora.scale, "sha256": lora.sha256} for lora in loras]
        self._digests: dict[Path, str] = {}  # of pictures

    def record(self, config: GenerateConfig) -> dict[str, object]:
        """All that made a picture, as flat JSON. Raises FormatError for a picture that cannot be read any more."""
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        files = {name: values.pop(name) for name in _PICTURES}
        made: dict[str, object] = {name: value for name, value in values.items() if value is not None}
        for name, source in files.items():
            if isinstance(source, (str, Path)):
                made |= {name: str(source), f"{name}_sha256": self._digest(Path(source))}
        return made | {"loras": [dict(lora) for lora in self._loras]} | self._facts

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = digest(path)
        return self._digests[path]


def identity(model: ModelFolder) -> dict[str, str]:
    """Where a model is, and what tells its weights from another's: their names, shapes and first numbers."""
    return {"model": str(model.path), "model_fingerprint": model_fingerprint(model)[:_DIGITS]}


def digest(path: Path) -> str:
    """The beginning of the SHA-256 of a file, or of the one in a folder. Raises FormatError if it cannot be read."""
    return sha256(find_weights(path) if path.is_dir() else path)[:_DIGITS]


@dataclass(frozen=True)
class Repeat:
    """What a record says to do again."""

    options: dict[str, object]  # fields of GenerateConfig
    choice: ModelChoice
    loras: list[RecordedLoRA]
    hashes: dict[str, str]  # of model and pictures: model_fingerprint, init_image_sha256, mask_sha256
    source: Path  # the picture

    @classmethod
    def read(cls, path: Path) -> Repeat:
        """What the picture `path` says. Raises ConfigError or FormatError if it does not say all."""
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
            parts={name: path for name, path in parts.items() if path is not None},
        )
        options = {name: value for name, value in options.items() if value is not None}
        hashes = {k: str(v) for k, v in record.items() if k.endswith(("_sha256", "_fingerprint"))}
        return cls(options, choice, loras, hashes, source)

    def config(self, **changes: object) -> GenerateConfig:
        """The picture's config with some fields changed. Raises ConfigError for values out of bounds."""
        return config_of(self.options | changes)

    def changes(self, model: Mapping[str, str], loras: Iterable[RecordedLoRA]) -> list[str]:
        """The files that are not those that the picture was made from. model: an `identity`. loras: those to be used.

        Raises FormatError for a picture that cannot be read.
        """
        found = []
        if model["model_fingerprint"] != self.hashes.get("model_fingerprint"):
            found.append(model["model"])
        before = {lora.sha256 for lora in self.loras}
        found += [str(lora.path) for lora in loras if lora.sha256 not in before]
        pictures = {name: str(self.options[name]) for name in _PICTURES if name in self.options}
        return found + [p for name, p in pictures.items() if digest(Path(p)) != self.hashes.get(f"{name}_sha256")]


def _recorded_loras(loras: object) -> list[RecordedLoRA]:
    """The LoRAs of a record. Raises KeyError, TypeError, ValueError or OverflowError if they are something else."""
    if not isinstance(loras, list) or not all(isinstance(lora, dict) for lora in loras):
        raise TypeError("loras is not a list of objects")
    return [RecordedLoRA(Path(lora["file"]), float(lora["scale"]), str(lora["sha256"])) for lora in loras]
