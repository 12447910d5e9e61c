"""The datasets of a server: folders of pictures with captions and masks, each by its name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from zimage_ref.errors import DatasetError
from zimage_ref.formats.files import atomic_write
from zimage_ref.pictures.formats import PICTURE_SUFFIXES
from zimage_ref.pictures.images import read_picture, save_picture, thumbnail
from zimage_ref.pictures.received import inverted, received
from zimage_ref.training.masks import MASK_SUFFIX, check_mask, mask_file, masks_among
from zimage_serve.refusals import ConflictError, RefusedError, UnknownError
from zimage_serve.store.names import checked_name, file_in, is_name
from zimage_serve.store.store import MOST_RECEIVED

from .file_facts import FileFacts, without_folder

_THUMBNAIL = 256  # pixels
LONGEST_CAPTION = 10_000  # characters


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
        """The pictures of a dataset with sizes and captions, and whether they have masks. Raises UnknownError."""
        folder = self.path(name)
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
        masks = masks_among(files)
        return {"name": folder.name, "pictures": [self._picture(path) for path in files if path not in masks]}

    def _picture(self, path: Path) -> dict[str, object]:
        caption = path.with_suffix(".txt")
        text = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
        try:
            width, height = self._sizes.of(path)
        except (DatasetError, OSError):
            return {"name": path.name, "caption": text, "mask": False, "problem": "cannot be read as a picture"}
        return {
            "name": path.name, "caption": text, "width": width, "height": height, "mask": mask_file(path).is_file(),
            "problem": None,
        }  # fmt: skip

    def add(self, dataset: object, name: object, data: bytes, caption: str) -> dict[str, object]:
        """Adds a picture and its caption. It is kept as a PNG. Transparent parts become a mask.

        A file that is named as a mask becomes that of its picture. Raises DatasetError or RefusedError.
        """
        folder, stem = self.path(dataset), checked_name(Path(str(name)).stem, "picture")
        if str(name).lower().endswith(MASK_SUFFIX):
            return self.set_mask(dataset, _picture_of(folder, str(name)[: -len(MASK_SUFFIX)]), data)
        got = received(data, stem, MOST_RECEIVED)
        number, path = 1, folder / f"{stem}.png"
        while path.exists():
            number += 1
            path = folder / f"{stem}-{number}.png"
        save_picture(got.picture, path)
        if got.hole is not None and (opaque := inverted(got.hole)).getbbox():
            save_picture(opaque, mask_file(path))
        self._caption(path, caption)
        return self._picture(path)

    def set_mask(self, dataset: object, name: object, data: bytes) -> dict[str, object]:
        """Gives a picture a mask: white parts are learned. Raises UnknownError, and DatasetError if it does not fit."""
        path = self.picture(dataset, name)
        mask = mask_file(path)
        incoming = path.with_name(f".incoming-{mask.name}")
        try:
            save_picture(received(data, mask.name, MOST_RECEIVED).picture.convert("L"), incoming)
            check_mask(incoming, self._sizes.of(path))
            incoming.replace(mask)
        except DatasetError as error:
            raise DatasetError(without_folder(path.parent, error)) from None
        finally:
            incoming.unlink(missing_ok=True)
        return self._picture(path)

    def mask(self, dataset: object, name: object) -> Path:
        """The file with the mask of a picture. Raises UnknownError."""
        return file_in(self.path(dataset), mask_file(self.picture(dataset, name)).name, "mask", PICTURE_SUFFIXES)

    def remove_mask(self, dataset: object, name: object) -> dict[str, object]:
        """Deletes the mask of a picture. Raises UnknownError."""
        self.mask(dataset, name).unlink()
        return self._picture(self.picture(dataset, name))

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
        """Deletes a picture with its caption and mask. Raises UnknownError."""
        path = self.picture(dataset, name)
        mask_file(path).unlink(missing_ok=True)
        path.unlink()
        self._sizes.forget(path)
        path.with_suffix(".txt").unlink(missing_ok=True)

    def delete(self, dataset: object) -> None:
        """Deletes a dataset. Raises UnknownError."""
        shutil.rmtree(self.path(dataset))


def _picture_of(folder: Path, stem: str) -> str:
    """The name of the picture `stem` in `folder`. Raises RefusedError if there is none."""
    for path in sorted(folder.iterdir()):
        if path.stem == stem and path.suffix.lower() in PICTURE_SUFFIXES:
            return path.name
    raise RefusedError(f"{stem}{MASK_SUFFIX}: is named as a mask, and there is no picture {stem}: send that one first")


def _checked_caption(text: object) -> str:
    if not isinstance(text, str) or len(text) > LONGEST_CAPTION or "\0" in text:
        raise RefusedError(f"a caption is a text of at most {LONGEST_CAPTION:,} characters")
    return text.strip()
