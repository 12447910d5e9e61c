"""What a picture was made from: the record that goes into it, and the way back from there.

Files are named as the user named them, and known again by what they hold: a LoRA or a picture by its SHA-256, a model
by that of the first numbers of every tensor, which takes a moment; reading all of it would take a minute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from zimage_ref.checkpoints.fingerprint import model_fingerprint
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.checkpoints.registry import part_options
from zimage_ref.errors import FormatError
from zimage_ref.formats.checkpoint import find_weights
from zimage_ref.formats.files import sha256
from zimage_ref.options_file import typed

from .config import GenerateConfig

_DIGITS = 16  # of a SHA-256
_PICTURES = ("init_image", "mask")


def engine_options() -> dict[str, type]:
    """What a record says of the engine and of the files that stood in for the model's own, and the type of each."""
    return {"backend": str, "dtype": str, "quantize": int, **dict.fromkeys(part_options(), Path)}


def record(config: GenerateConfig, loras: Sequence[tuple[str | Path, float]], **facts: object) -> dict[str, Any]:
    """All that made a picture, as flat JSON; `facts` are `identity` of the model, the backend and the like."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    files = {name: values.pop(name) for name in _PICTURES}
    made: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    for name, source in files.items():
        if isinstance(source, (str, Path)):
            made |= {name: str(source), f"{name}_sha256": digest(Path(source))}
    made["loras"] = [{"file": str(path), "scale": scale, "sha256": digest(Path(path))} for path, scale in loras]
    return made | {name: fact for name, fact in facts.items() if fact is not None}


def identity(model: ModelFolder) -> dict[str, str]:
    """Where a model is, and what tells its weights from another's: their names, shapes and first numbers."""
    return {"model": str(model.path), "model_fingerprint": model_fingerprint(model)[:_DIGITS]}


def digest(path: Path) -> str:
    """The beginning of the SHA-256 of a file, or of the one in a folder. Raises FormatError if it cannot be read."""
    return sha256(find_weights(path) if path.is_dir() else path)[:_DIGITS]


@dataclass(frozen=True)
class Repeat:
    """What a record says to do again."""

    options: dict[str, Any]  # fields of GenerateConfig
    model: str
    loras: list[tuple[Path, float]]
    engine: dict[str, Any]  # backend, dtype, quantize and the files of parts, if it says so
    hashes: dict[str, str]  # of everything that has one; a LoRA's by its place
    source: Path  # the picture

    @classmethod
    def of(cls, record: Mapping[str, Any], source: Path) -> Repeat:
        """Reads a record. Raises ConfigError or FormatError naming `source` if it is not complete."""

        def known(hints: Mapping[str, Any]) -> dict[str, Any]:
            given = {k: hint for k, hint in hints.items() if record.get(k) is not None}
            return {k: typed(record[k], hint, f"{source}: {k}") for k, hint in given.items()}

        try:
            loras = [(Path(lora["file"]), float(lora["scale"])) for lora in record["loras"]]
            hashes = {str(i): str(lora["sha256"]) for i, lora in enumerate(record["loras"])}
            options = known(get_type_hints(GenerateConfig))
            if "prompt" not in options or record.get("model") is None:
                raise KeyError("prompt and model")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{source}: its metadata cannot be understood: {error!r}") from error
        named = {k: str(v) for k, v in record.items() if k.endswith(("_sha256", "_fingerprint"))}
        return cls(options, str(record["model"]), loras, known(engine_options()), hashes | named, source)

    def changes(self, model: Mapping[str, str], loras: Iterable[tuple[str | Path, float]]) -> list[str]:
        """Which files are not those that the picture was made from, `model` being an `identity`."""
        found = []
        if model["model_fingerprint"] != self.hashes.get("model_fingerprint"):
            found.append(model["model"])
        found += [str(path) for path, _ in loras if digest(Path(path)) not in self.hashes.values()]
        for name in _PICTURES:
            if name in self.options and digest(Path(self.options[name])) != self.hashes.get(f"{name}_sha256"):
                found.append(str(self.options[name]))
        return found
