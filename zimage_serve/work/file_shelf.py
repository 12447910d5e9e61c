"""Files of one kind in one folder: found, renamed and deleted, each by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path

from zimage_ref.errors import ZImageError
from zimage_serve.refusals import ConflictError
from zimage_serve.store.names import checked_name, file_in, is_name

from .file_facts import FileFacts, without_folder


class FileShelf(ABC):
    """The files of one kind, directly in the folder."""

    what: str  # a file is called so in messages
    suffixes: Collection[str]  # of files that are found
    made: str  # the suffix of files that are made here; clients may leave it out

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = FileFacts(self._facts)

    def path(self, name: object) -> Path:
        """The file `name`, with or without its suffix. Raises UnknownError or RefusedError."""
        if isinstance(name, str) and Path(name).suffix not in self.suffixes:
            name += self.made
        return file_in(self.folder, name, self.what, self.suffixes)

    def names(self) -> list[str]:
        """The names of all files."""
        found = (path for path in self.folder.iterdir() if path.suffix in self.suffixes)
        return sorted(path.name for path in found if is_name(path.name) and path.is_file() and not path.is_symlink())

    def facts(self, name: object) -> dict[str, object]:
        """Facts from the header of a file. problem: why it cannot be used. Raises UnknownError."""
        return self._files.of(self.path(name))

    def _facts(self, path: Path) -> dict[str, object]:
        stat = path.stat()
        facts: dict[str, object] = {
            "name": path.name, "bytes": stat.st_size, "changed": stat.st_mtime, "problem": None
        }  # fmt: skip
        try:
            return facts | self._read(path)
        except ZImageError as error:
            return facts | {"problem": without_folder(self.folder, error)}

    @abstractmethod
    def _read(self, path: Path) -> dict[str, object]:
        """Facts that only files of this kind have. Raises ZImageError for a file of another kind."""

    def _beside(self, path: Path) -> Iterable[Path]:
        """Files that belong to the file `path`, if they are there."""
        return ()

    def rename(self, name: str, wanted: object) -> dict[str, object]:
        """Gives the file `name` another name, with or without its suffix. Returns its facts.

        Raises UnknownError, RefusedError, or ConflictError if the other name is taken.
        """
        path = self.path(name)
        target = self.free(wanted, path.suffix)
        others = list(zip(self._beside(path), self._beside(target), strict=True))
        path.rename(target)
        for other, new in others:
            if other.is_file():
                other.rename(new)
        self._files.forget(path)
        return self.facts(target.name)

    def free(self, name: object, suffix: str = "") -> Path:
        """The path for a new file `name`, with or without `suffix`. Raises RefusedError or ConflictError."""
        ending = suffix or self.made
        target = self.folder / (checked_name(name, self.what).removesuffix(ending) + ending)
        if target.exists():
            raise ConflictError(f"{target.name}: a {self.what} with this name exists: delete it, or send another name")
        return target

    def delete(self, name: str) -> None:
        """Deletes a file and what belongs to it. Raises UnknownError."""
        path = self.path(name)
        path.unlink()
        for other in self._beside(path):
            other.unlink(missing_ok=True)
        self._files.forget(path)
