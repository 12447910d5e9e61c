"""Latents, masks, caption features and predictions on disk, kept between runs: names and layout of their files.

    <cache>/latents/<key>.safetensors     <cache>/captions/<key>.safetensors     <cache>/masks/<key>.safetensors
    <cache>/predictions/<key>.safetensors

A key is a digest of everything that the value depends on, so an entry is never out of date. A file holds one tensor,
`value`, and the SHA-256 of its bytes. A damaged file counts as absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zimage_ref.checkpoints.fingerprint import part_digests
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import FormatError
from zimage_ref.formats import safetensors
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.tensors import Array, Tensor

from .buckets import Size
from .dataset import Example

VERSION = 1  # raise it when the same inputs give other values; it is part of every key


class TrainCache:
    """A folder of entries made by one model on one engine."""

    def __init__(self, folder: Path, model: ModelFolder, engine: str, quantization: Quantization | None = None) -> None:
        """engine: the engine that computes the values and its precision. quantization: that of the text encoder."""
        self.folder = folder
        digests = part_digests(model)
        self._vae = [engine, digests["vae"]]
        self._transformer = [engine, digests["transformer"]]
        self._text_encoder = [engine, digests["text_encoder"], digests["tokenizer"]]
        if quantization:
            self._text_encoder.append(f"{quantization.bits} bits in groups of {quantization.group_size}")

    def latents(self, example: Example, size: Size, flip: bool) -> Path:
        """The file of the latents of a picture at a size, mirrored if `flip`."""
        return self._entry("latents", [example.digest, *size, flip, *self._vae])

    def mask(self, example: Example, size: Size, flip: bool, factor: int) -> Path:
        """The file of the mask of a picture, `factor` times smaller than `size`."""
        digest = example.mask.digest if example.mask else None
        return self._entry("masks", [digest, example.settings.mask, *size, flip, factor])

    def caption(self, text: str) -> Path:
        """The file of the features of a caption."""
        return self._entry("captions", [text, *self._text_encoder])

    def prediction(self, inputs: Sequence[Array]) -> Path:
        """The file of what the transformer makes of `inputs`, by their values."""
        return self._entry("predictions", [*map(_array_digest, inputs), *self._transformer])

    def _entry(self, kind: str, facts: list[object]) -> Path:
        key = hashlib.sha256(json.dumps([VERSION, kind, *facts]).encode()).hexdigest()
        return self.folder / kind / f"{key}.safetensors"


def entry_names(folder: Path) -> list[Path]:
    """Names as long as those of the entries in the cache `folder`, one for each kind."""
    return [folder / kind / f"{'0' * 64}.safetensors" for kind in ("latents", "captions", "masks", "predictions")]


def read_entry(path: Path) -> Array:
    """The value in `path`. Raises FormatError if it is absent or damaged."""
    tensors, metadata = safetensors.read(path)
    if "value" not in tensors:
        raise FormatError(f"{path}: is not an entry of a training cache")
    value = np.array(tensors["value"].read())
    if metadata.get("sha256") != _array_digest(value):
        raise FormatError(f"{path}: is damaged: its checksum differs")
    return value


def write_entry(path: Path, value: Array) -> None:
    """Writes `value` to `path`, completely or not at all."""
    safetensors.write(path, {"value": Tensor.of(value)}, {"sha256": _array_digest(value)})


def is_entry(path: Path) -> bool:
    """Whether `path` holds a complete entry."""
    try:
        read_entry(path)
    except FormatError:
        return False
    return True


def _array_digest(value: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
