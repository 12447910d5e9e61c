"""Latents and caption features on disk, kept between runs: what an entry is called, and how its file is laid out.

    <cache>/latents/<key>.safetensors     <cache>/captions/<key>.safetensors

A key is a digest of everything that the value depends on, so an entry is never out of date. A file holds one tensor,
`value`, and the SHA-256 of its bytes; a file that is damaged counts as absent.
"""

from __future__ import annotations

import hashlib
import json
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

VERSION = 1  # of the keys: raise it when the same inputs give other values


class TrainCache:
    """A folder of entries made by one model on one engine."""

    def __init__(self, folder: Path, model: ModelFolder, engine: str, quantization: Quantization | None = None) -> None:
        """engine: what computes the values, and in which precision. quantization: of the text encoder."""
        self.folder = folder
        digests = part_digests(model)
        self._vae = [engine, digests["vae"]]
        self._text_encoder = [engine, digests["text_encoder"], digests["tokenizer"]]
        if quantization:
            self._text_encoder.append(f"{quantization.bits} bits in groups of {quantization.group_size}")

    def latents(self, example: Example, size: Size, flip: bool) -> Path:
        """Where the latents of a picture at a size are, mirrored with `flip`."""
        return self._entry("latents", [example.digest, *size, flip, *self._vae])

    def caption(self, text: str) -> Path:
        """Where the features of a caption are."""
        return self._entry("captions", [text, *self._text_encoder])

    def _entry(self, kind: str, facts: list[object]) -> Path:
        key = hashlib.sha256(json.dumps([VERSION, kind, *facts]).encode()).hexdigest()
        return self.folder / kind / f"{key}.safetensors"


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
    """Writes `value` to `path`, whole or not at all."""
    safetensors.write(path, {"value": Tensor.of(value)}, {"sha256": _array_digest(value)})


def is_entry(path: Path) -> bool:
    """Whether `path` holds a whole entry."""
    try:
        read_entry(path)
    except FormatError:
        return False
    return True


def _array_digest(value: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
