"""The LoRAs and datasets of a server: listed, inspected, received and deleted, each by its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from zimage_ref.errors import DatasetError, ZImageError
from zimage_ref.formats.files import atomic_write
from zimage_ref.lora.alpha import sidecar
from zimage_ref.lora.file import LoRAFile, read_lora
from zimage_ref.lora.merge import module_groups
from zimage_ref.lora.sums import trigger_of
from zimage_ref.model.config import TransformerConfig
from zimage_ref.model.parameters import transformer_parameters
from zimage_ref.pictures.formats import PICTURE_SUFFIXES
from zimage_ref.pictures.images import read_picture, save_picture, thumbnail
from zimage_ref.pictures.received import received
from zimage_serve.refusals import ConflictError, RefusedError, UnknownError
from zimage_serve.store.names import checked_name, file_in, is_name
from zimage_serve.store.store import MOST_RECEIVED

from .file_facts import FileFacts, without_folder
from .file_shelf import FileShelf

_LORA = ".safetensors"
_THUMBNAIL = 256  # pixels
LONGEST_CAPTION = 10_000  # characters


class LoRAShelf(FileShelf):
    """The LoRAs in one folder."""

    what = "LoRA"
    suffixes = (_LORA,)
    made = _LORA

    def __init__(self, folder: Path, transformer: TransformerConfig) -> None:
        """transformer: that of the model; only LoRAs that fit it are received."""
        super().__init__(folder)
        self._shapes = transformer_parameters(transformer)

    def read(self, path: Path) -> LoRAFile:
        """The LoRA in the file `path`. Raises the errors of `read_lora`."""
        return read_lora(path, self._shapes)

    def _read(self, path: Path) -> dict[str, object]:
        return {"trigger": trigger_of(path), **self.read(path).facts()}

    def _beside(self, path: Path) -> Iterable[Path]:
        return (sidecar(path),)

    def inspect(self, name: str) -> dict[str, object]:
        """The facts, and how much the LoRA changes each module. Raises ZImageError if it cannot be read."""
        return {**self.facts(name), "changes": _changes(read_lora(self.path(name)))}

    def receive(self, name: object, data: BinaryIO) -> dict[str, object]:
        """Keeps an uploaded LoRA.

        Raises ConflictError if the name is taken, RefusedError if it is no LoRA for this model.
        """
        wanted = checked_name(name, self.what)
        if not wanted.endswith(_LORA):
            raise RefusedError(f"{wanted}: a LoRA is a {_LORA} file")
        target = self.free(wanted)
        incoming = self.folder / f".incoming-{wanted}"
        try:
            with atomic_write(incoming) as file:
                shutil.copyfileobj(data, file, 2**20)
            try:
                self.read(incoming)
            except ZImageError as error:
                raise RefusedError(f"{wanted}: {without_folder(self.folder, error)}") from None
            incoming.rename(target)
        finally:
            incoming.unlink(missing_ok=True)
        return self.facts(wanted)


class DatasetShelf:
    """The datasets in one folder: each a folder of pictures with captions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._sizes = folder, FileFacts(lambda path: read_picture(path).size)

    def path(self, name: object) -> Path:
        """The folder of the dataset `name`. Raises UnknownError or RefusedError."""
        wanted = checked_name(name, "dataset")
        for path in self.folder.iterdir():
            if path.name == wanted and path.is_dir() and not path.is_symlink():
                return path
        raise UnknownError(f"dataset {wanted}: does not exist")

    def names(self) -> list[str]:
        """The names of all datasets."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir() and is_name(path.name))

    def make(self, name: object) -> str:
        """Makes an empty dataset. Raises ConflictError if there is one with this name."""
        wanted = checked_name(name, "dataset")
        try:
            (self.folder / wanted).mkdir()
        except FileExistsError:
            raise ConflictError(f"{wanted}: a dataset with this name exists") from None
        return wanted

    def facts(self, name: object) -> dict[str, object]:
        """The pictures of a dataset with their sizes and captions. Raises UnknownError."""
        folder = self.path(name)
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
        return {"name": folder.name, "pictures": [self._picture(path) for path in files]}

    def _picture(self, path: Path) -> dict[str, object]:
        caption = path.with_suffix(".txt")
        text = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
        try:
            width, height = self._sizes.of(path)
        except (DatasetError, OSError):
            return {"name": path.name, "caption": text, "problem": "cannot be read as a picture"}
        return {"name": path.name, "caption": text, "width": width, "height": height, "problem": None}

    def add(self, dataset: object, name: object, data: bytes, caption: str) -> dict[str, object]:
        """Adds a picture and its caption. It is kept as a PNG. Raises DatasetError or RefusedError."""
        folder, stem = self.path(dataset), checked_name(Path(str(name)).stem, "picture")
        got = received(data, stem, MOST_RECEIVED)
        number, path = 1, folder / f"{stem}.png"
        while path.exists():
            number += 1
            path = folder / f"{stem}-{number}.png"
        save_picture(got.picture, path)
        self._caption(path, caption)
        return self._picture(path)

    def picture(self, dataset: object, name: object) -> Path:
        """The file of a picture. Raises UnknownError."""
        return file_in(self.path(dataset), name, "picture", PICTURE_SUFFIXES)

    def thumbnail(self, dataset: object, name: object) -> bytes:
        """A picture as a small JPEG. Raises UnknownError or DatasetError."""
        return thumbnail(self.picture(dataset, name), _THUMBNAIL)

    def caption(self, dataset: object, captions: Mapping[str, object]) -> None:
        """Writes captions by the names of pictures. Raises UnknownError or RefusedError before any is written."""
        files = {self.picture(dataset, name): text for name, text in captions.items()}
        for text in files.values():
            _checked_caption(text)
        for path, text in files.items():
            self._caption(path, str(text))

    def _caption(self, picture: Path, text: str) -> None:
        path, caption = picture.with_suffix(".txt"), _checked_caption(text)
        if caption:
            with atomic_write(path) as file:
                file.write(f"{caption}\n".encode())
        else:
            path.unlink(missing_ok=True)

    def remove(self, dataset: object, name: object) -> None:
        """Deletes a picture and its caption. Raises UnknownError."""
        path = self.picture(dataset, name)
        path.unlink()
        self._sizes.forget(path)
        path.with_suffix(".txt").unlink(missing_ok=True)

    def delete(self, dataset: object) -> None:
        """Deletes a dataset. Raises UnknownError."""
        shutil.rmtree(self.path(dataset))


def _checked_caption(text: object) -> str:
    if not isinstance(text, str) or len(text) > LONGEST_CAPTION or "\0" in text:
        raise RefusedError(f"a caption is a text of at most {LONGEST_CAPTION:,} characters")
    return text.strip()


def _changes(file: LoRAFile) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for group, updates in module_groups(file.updates).items():
        norms = [update.norm() for update in updates]
        ranks = sorted({rank for update in updates if (rank := update.rank) is not None})
        rows.append({"module": group, "blocks": len(updates), "ranks": ranks, "mean_norm": sum(norms) / len(norms),
                     "largest_norm": max(norms)})  # fmt: skip
    return rows
