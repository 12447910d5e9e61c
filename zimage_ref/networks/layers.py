"""The layers of the NumPy transformer at one noise level, run as a whole or in parts, as a step cache wants them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from zimage_ref.formats.tensors import Array

from .hints import hints_of
from .steering import Contrast

if TYPE_CHECKING:
    from .transformer import Conditioning, Transformer


class Layers:
    """The noise refiner and the layers on latents x (B, C, h, w). See `model.step_cache.Layers`."""

    def __init__(self, model: Transformer, x: Array, adaln: Array, conditioning: Conditioning) -> None:
        """adaln: (B, adaln), the embedded time."""
        self.rows, self.count = len(x), len(model.layers)
        self._model, self._x, self._adaln, self._conditioning = model, x, adaln, conditioning
        self._places: Collection[int] = ()
        self._hints: Iterator[Array] = iter(())

    def output(self) -> Array:
        """The stream (B, S, D) after the last layer."""
        return self.run(self.enter(), 0, self.count, range(self.rows))

    def enter(self) -> Array:
        """The tokens of image and caption before the first layer, (B, S, D)."""
        model, conditioning = self._model, self._conditioning
        embedded = tokens = model.embed_image(self._x)  # (B, L, D)
        for block in model.noise_refiner:
            tokens = block(tokens, conditioning.image_rotation, None, self._adaln)
        self._places, self._hints = hints_of(model, embedded, tokens, conditioning, self._adaln)
        return np.concatenate([tokens, conditioning.caption], axis=1)  # (B, S, D)

    def run(self, stream: Array, first: int, end: int, rows: Sequence[int]) -> Array:
        """See `model.step_cache.Layers`."""
        conditioning, chosen = self._conditioning, slice(None) if len(rows) == self.rows else list(rows)
        rotation, adaln = conditioning.rotation[chosen], self._adaln[chosen]
        mask = _rows_of(conditioning.mask, chosen)
        for i in range(first, end):
            stream = self._model.layers[i](stream, rotation, mask, adaln)
            stream = stream + next(self._hints)[chosen] if i in self._places else stream
        return stream

    def joined(self, rows: Sequence[Array]) -> Array:
        """See `model.step_cache.Layers`."""
        return np.concatenate(rows)

    def kept(self, stream: Array) -> Array:
        """The stream itself: NumPy has computed it."""
        return stream

    def size(self, stream: Array, row: int) -> float:
        """See `model.step_cache.Layers`."""
        return float(np.abs(stream[0, self._present(row)]).mean())

    def growth(self, stream: Array, before: Array, row: int) -> float:
        """See `model.step_cache.Layers`."""
        lengths, earlier = (np.linalg.norm(a[0, self._present(row)], axis=-1) for a in (stream, before))
        return float((lengths / (earlier + 1e-8)).mean())

    def _present(self, row: int) -> Array | slice:
        """The tokens of a row that any token attends to: without those that fill up a shorter caption."""
        mask = self._conditioning.mask
        if not isinstance(mask, Contrast):
            return slice(None) if mask is None else np.asarray(mask[row, 0].any(axis=0))
        L, S = self._conditioning.image_rotation.shape[1], self._conditioning.rotation.shape[1]
        own = np.ones(S, bool) if mask.positive is None else mask.positive[row, 0].any(axis=0)
        other = np.ones(mask.rotation.shape[1] - L, bool)
        if mask.negative is not None:
            other = mask.negative[row, 0, 0, L:]
        return np.concatenate([own, other])


def _rows_of(mask: Array | Contrast | None, rows: list[int] | slice) -> Array | Contrast | None:
    """The mask of some rows of a batch."""
    if isinstance(mask, Contrast):
        positive, negative = (None if m is None else m[rows] for m in (mask.positive, mask.negative))
        return replace(mask, positive=positive, negative=negative, rotation=mask.rotation[rows])
    return None if mask is None else mask[rows]
