"""The ControlNets of a server: files and folders in one folder, each by its name."""

from __future__ import annotations

from pathlib import Path

from zimage_ref.checkpoints.control_file import ControlFile
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ZImageError
from zimage_ref.formats.checkpoint import READABLE
from zimage_serve.refusals import RefusedError, UnknownError
from zimage_serve.store.names import checked_name, is_name

from .file_facts import FileFacts, without_folder


class ControlShelf:
    """The ControlNets in one folder. The user puts them there: they are too large to be sent."""

    def __init__(self, folder: Path, model: ModelFolder) -> None:
        """model: the one that they are to steer."""
        self.folder, self._model = folder, model
        self._facts = FileFacts(self._read)

    def names(self) -> list[str]:
        """The names of all ControlNets."""
        return sorted(path.name for path in self._entries())

    def _entries(self) -> list[Path]:
        """The weights directly in the folder: files, and folders as diffusers writes them. Links are not followed."""
        found = [path for path in self.folder.iterdir() if is_name(path.name) and not path.is_symlink()]
        return [path for path in found if path.is_dir() or path.suffix in READABLE]

    def facts(self, name: object) -> dict[str, object]:
        """Facts about a ControlNet. problem: why it cannot be used. Raises UnknownError."""
        return self._facts.of(self._find(name))

    def path(self, name: object) -> Path:
        """The ControlNet `name`, with or without the suffix of its file.

        Raises UnknownError, and RefusedError if it does not fit the model.
        """
        path = self._find(name)
        if problem := self._facts.of(path)["problem"]:
            raise RefusedError(str(problem))
        return path

    def _find(self, name: object) -> Path:
        wanted = checked_name(name, "ControlNet")
        for path in self._entries():
            if wanted in (path.name, path.name.removesuffix(path.suffix)):
                return path
        raise UnknownError(f"ControlNet {wanted}: no such file")

    def _read(self, path: Path) -> dict[str, object]:
        facts: dict[str, object] = {"name": path.name, "variant": None, "bytes": None, "problem": None}
        try:
            file = ControlFile.open(path, self._model)
        except ZImageError as error:
            return facts | {"problem": without_folder(self.folder, error)}
        return facts | {"variant": file.config.variant, "bytes": file.path.stat().st_size}
