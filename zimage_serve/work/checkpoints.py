"""The checkpoints of a server: files with the weights of a network, and the transformer that the server itself uses."""

from __future__ import annotations

from pathlib import Path

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.checkpoints.transformer import TRANSFORMER
from zimage_ref.formats.checkpoint import READABLE, Checkpoint
from zimage_ref.inspection import Description, describe
from zimage_serve.refusals import RefusedError

from .file_facts import FileFacts
from .file_shelf import FileShelf

OWN = "model"  # the name of the server's own transformer


class CheckpointShelf(FileShelf):
    """The checkpoints in one folder, and the server's own transformer, which cannot be changed."""

    what = "checkpoint"
    suffixes = READABLE
    made = ".safetensors"

    def __init__(self, folder: Path, model: ModelFolder) -> None:
        super().__init__(folder)
        self._own = model.files[TRANSFORMER.name]
        self._described = FileFacts(lambda path: describe(Checkpoint.open(path)))

    def path(self, name: object) -> Path:
        """The file `name`; that of the server's transformer for OWN. Raises UnknownError or RefusedError."""
        return self._own if name == OWN else super().path(name)

    def all(self) -> list[dict[str, object]]:
        """The facts of the server's transformer, and those of all files."""
        return [self.facts(name) for name in (OWN, *self.names())]

    def facts(self, name: object) -> dict[str, object]:
        """Facts from the header of a checkpoint, as `zimage inspect` has them. Raises UnknownError."""
        facts = super().facts(name)
        return {**facts, "name": OWN, "own": True} if name == OWN else {**facts, "own": False}

    def _read(self, path: Path) -> dict[str, object]:
        found = self._described.of(path)
        return {
            "looks_like": found.looks_like, "model_type": found.model_type, "container": found.container,
            "written_by": found.written_by, "parameters": found.parameters, "precision": _precision(found),
            "bytes": sum(summary["bytes"] for summary in found.dtypes.values()),  # a model may be in several files
        }  # fmt: skip

    def inspect(self, name: str) -> dict[str, object]:
        """The facts, and the tensors. Raises UnknownError, and FormatError if it cannot be read."""
        found = self._described.of(self.path(name)).to_json()
        return {**self.facts(name), "dtypes": found["dtypes"], "tensors": found["tensors"]}

    def file(self, name: str) -> Path:
        """The file of a checkpoint that clients may have. Raises UnknownError, and RefusedError for OWN."""
        _check_not_own(name)
        return self.path(name)

    def rename(self, name: str, wanted: object) -> dict[str, object]:
        """As `FileShelf.rename`. Raises RefusedError for OWN."""
        _check_not_own(name)
        return super().rename(name, wanted)

    def free(self, name: object, suffix: str = "") -> Path:
        """As `FileShelf.free`. Raises RefusedError for OWN."""
        _check_not_own(str(name).removesuffix(self.made))
        return super().free(name, suffix)

    def delete(self, name: str) -> None:
        """As `FileShelf.delete`. Raises RefusedError for OWN."""
        _check_not_own(name)
        super().delete(name)


def _precision(found: Description) -> str:
    """The types of the numbers, those of most bytes first."""
    sizes = {dtype: summary["bytes"] for dtype, summary in found.dtypes.items()}
    return ", ".join(sorted(sizes, key=lambda dtype: -sizes[dtype]))


def _check_not_own(name: object) -> None:
    if name == OWN:
        raise RefusedError(f"{OWN}: is the name of the server's transformer: give another `name`")
