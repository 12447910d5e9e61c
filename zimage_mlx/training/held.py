"""The weights that a run changes. They are in memory, or those of blocks are in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from zimage_mlx.networks.transformer import Transformer
from zimage_mlx.networks.tree import find, place
from zimage_mlx.networks.weights import from_stored, to_mlx, to_stored
from zimage_ref.formats.scratch import ScratchFile
from zimage_ref.formats.tensors import BFLOAT16, DType, Tensor, Tensors
from zimage_ref.model.parameters import block_of


class Held:
    """Weights of a transformer by name. Those in `on_disk` are in a scratch file, the others in memory."""

    def __init__(self, model: Transformer, on_disk: Mapping[str, Tensor] | None = None) -> None:
        self._model, self._on_disk = model, on_disk or {}

    def like(self, name: str) -> mx.array:
        """An array of the shape and dtype of the weight; of one on disk, its values are not in it."""
        path, _, key = name.rpartition(".")
        array: mx.array = find(self._model, path)[key]
        return array

    def get(self, name: str) -> mx.array:
        """The weight as it is now."""
        tensor = self._on_disk.get(name)
        return self.like(name) if tensor is None else from_stored(tensor.read())

    def put(self, name: str, array: mx.array) -> None:
        """Makes `array`, which is computed, the weight."""
        tensor = self._on_disk.get(name)
        if tensor is None:
            place(self._model, {name: array})
            return
        assert tensor.span is not None and isinstance(tensor.span.file, ScratchFile)
        tensor.span.file.replace(tensor, to_stored(array))

    def tensor(self, name: str) -> Tensor:
        """The weight as a file stores it, read when it is asked for."""
        return self._on_disk.get(name) or as_tensor(self.like(name))


def on_disk(tensors: Tensors, dtype: mx.Dtype, folder: Path) -> dict[str, Tensor]:
    """`tensors` with those of blocks in a scratch file in `folder`, in `dtype`."""
    file = ScratchFile(folder)
    return {
        name: file.add(to_stored(to_mlx(tensor, dtype))) if block_of(name) else tensor
        for name, tensor in tensors.items()
    }


def as_tensor(array: mx.array) -> Tensor:
    """`array` as a file stores it, copied when it is read."""
    return Tensor(array.shape, _stored_dtype(array.dtype), lambda: to_stored(array))


def _stored_dtype(dtype: mx.Dtype) -> DType:
    return BFLOAT16 if dtype == mx.bfloat16 else np.dtype(str(dtype).rpartition(".")[2])
