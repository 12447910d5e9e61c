"""Pictures with captions, in a folder and its subfolders, as examples to train on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zimage_ref.errors import DatasetError, listing
from zimage_ref.formats.content import Content
from zimage_ref.formats.tensors import Array
from zimage_ref.pictures.files import missing_reader
from zimage_ref.pictures.formats import PICTURE_SUFFIXES, format_of
from zimage_ref.pictures.images import alpha, brightness, cover, flat, mirror, picture_bytes, to_array
from zimage_ref.pictures.reading import decode

from .captions import is_caption, is_list, lines_of, read_captions
from .dataset_files import DatasetFiles, find_files
from .dataset_options import DatasetSettings
from .masks import check_alpha, check_mask, latent_mask, mask_file, masks_among, orphans

TRIGGER_MARK = "[trigger]"
_PLAIN = DatasetSettings()
Notify = Callable[[str], None]  # takes a line that the user should see


def _ignore(notice: str) -> None:
    """Drops a notice."""


@dataclass(frozen=True)
class Example:
    """One picture to train on, and its caption."""

    picture: Path
    caption: str
    size: tuple[int, int]  # width, height in pixels, upright
    digest: str  # SHA-256 of the file
    content: Content = field(compare=False, repr=False)  # the file as it was when it was checked
    settings: DatasetSettings = _PLAIN  # those of its dataset
    mask: Content | None = field(default=None, compare=False, repr=False)  # the file of its mask, or of its own alpha

    @classmethod
    def open(cls, picture: Path, caption: str, notify: Notify = _ignore, settings: DatasetSettings = _PLAIN) -> Example:
        """Reads the picture and its mask. Raises DatasetError if one cannot be read, or if the mask does not fit.

        notify: takes remarks on the file.
        """
        content = Content(picture, picture_bytes(picture))
        decoded = decode(content.read(), picture)
        for remark in decoded.remarks:
            notify(remark)
        mask = None
        if settings.mask == "file" and (file := mask_file(picture)).is_file():
            mask = Content(file, check_mask(file, decoded.picture.size))
        elif settings.mask == "alpha" and check_alpha(decoded.picture, picture):
            mask = content
        return cls(picture, caption, decoded.picture.size, content.digest, content, settings, mask)

    def latent_mask(self, width: int, height: int, flip: bool, factor: int) -> Array:
        """The part of the picture that is learned, (height / factor, width / factor) in 0..1. It needs a mask.

        Raises FormatError if the file was changed since it was checked.
        """
        assert self.mask is not None
        found = decode(self.mask.read(), self.picture).picture
        own = alpha(found) if self.settings.mask == "alpha" else brightness(found)
        assert own is not None
        return latent_mask(own, (width, height), flip, factor)

    def forget(self) -> None:
        """Frees the content of the files. They are read again when they are needed."""
        self.content.forget()
        if self.mask:
            self.mask.forget()

    def pixels(self, width: int, height: int, flip: bool = False) -> Array:
        """The picture as (3, height, width) float32 in [-1, 1], scaled and cropped by `cover`; mirrored if `flip`.

        Raises FormatError if the file was changed since it was checked.
        """
        picture = cover(flat(decode(self.content.read(), self.picture).picture), width, height)
        return to_array(mirror(picture) if flip else picture)


def list_dataset(
    folder: Path, trigger: str = "", notify: Notify = _ignore, *, masks: bool = False, lines: bool = False
) -> list[tuple[Path, str]]:
    """Every picture of `folder` with its caption, which includes `trigger`. Sorted by path; pictures are not read yet.

    notify: takes a notice for each reason why files are left out. With a `trigger`, a picture may have no caption.
    masks: whether files of masks are used. lines: whether each line of a caption is a caption of its own.
    Raises DatasetError naming the file if there is no folder, no picture, a missing or empty caption, a caption in a
    list without a picture, or one caption file for two pictures.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: is not a folder: `dataset` takes one with pictures and captions")
    files = find_files(folder)
    _set_masks_aside(files, masks)
    pictures = [path for path in files.found if _is_readable(path, files)]
    if not pictures:
        reasons = "".join(f"; {notice}" for notice in files.notices())
        raise DatasetError(f"{folder}: holds no pictures ({', '.join(PICTURE_SUFFIXES)}){reasons}")
    captions = read_captions(files, pictures, may_lack=bool(trigger))
    for notice in files.notices():
        notify(notice)
    if bare := [picture.name for picture, caption in zip(pictures, captions, strict=True) if not caption]:
        notify(
            f"{folder}: pictures without a caption are trained with `trigger` alone ({len(bare)}): {listing(bare, 5)}"
        )
    return [
        (picture, _with_trigger_in_each(caption, trigger) if lines else with_trigger(caption, trigger))
        for picture, caption in zip(pictures, captions, strict=True)
    ]


def _with_trigger_in_each(caption: str, trigger: str) -> str:
    """`caption` with `trigger` in each line that is not empty."""
    return "\n".join(with_trigger(line, trigger) for line in lines_of(caption)) or trigger


def _set_masks_aside(files: DatasetFiles, used: bool) -> None:
    """Takes masks out of the files that may be pictures. Those that are not used are left out with the reason."""
    masks = masks_among(files.found)
    if not used:
        for path in sorted(masks):
            files.leave_out(path, "a mask: `mask` file uses it")
    else:
        lone = orphans(files.found, masks)
        for path in lone:
            files.leave_out(path, "a mask without a picture")
        masks |= set(lone)
    files.found = [path for path in files.found if path not in masks]


def _is_readable(path: Path, files: DatasetFiles) -> bool:
    """Whether `path` is a picture that can be read here. If it is no caption either, it is left out."""
    format = format_of(path)
    if format is None:
        if not is_caption(path) and not is_list(path, files.folder):
            files.leave_out(path, "neither a picture nor a caption")
        return False
    if missing := missing_reader(format):
        files.leave_out(path, missing)
    return not missing


def with_trigger(caption: str, trigger: str) -> str:
    """`caption` with `trigger` in place of [trigger]. If it has neither of them, `trigger` is put before it.

    An empty caption becomes `trigger`.
    """
    if not trigger or not caption:
        return caption or trigger
    if TRIGGER_MARK in caption:
        return caption.replace(TRIGGER_MARK, trigger)
    return caption if trigger in caption else f"{trigger}, {caption}"


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits `examples` in two: those to train on, and those held out. `seed` chooses which are held out.

    Held out are `fraction` of them, at least one. Raises DatasetError if none would remain to train on.
    """
    count = max(1, round(fraction * len(examples)))
    if count >= len(examples):
        raise DatasetError(f"`validation` {fraction:g} of {len(examples)} pictures leaves none to train on")
    held = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )


def fingerprint(examples: Sequence[Example]) -> str:
    """A digest of all pictures, captions, masks, and their order."""
    digest = hashlib.sha256()
    for example in examples:
        masked = [example.settings.mask, example.mask.digest] if example.mask else []
        dataset = [example.settings.number] if example.settings.number else []
        digest.update(json.dumps([example.digest, example.caption, *masked, *dataset]).encode())
    return digest.hexdigest()
