"""The layers of the transformer on MLX at one noise level, run as a whole or in parts, as a step cache wants them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import mlx.core as mx
from mlx.utils import tree_map

from .hints import hints_of

if TYPE_CHECKING:
    from .transformer import Conditioning, Transformer

T = TypeVar("T")


class Layers:
    """The noise refiner and the layers on latents x (B, C, h, w). See `zimage_ref.model.step_cache.Layers`."""

    def __init__(self, model: Transformer, x: mx.array, adaln: mx.array, conditioning: Conditioning) -> None:
        """adaln: (B or 1, adaln), the embedded time."""
        self.rows, self.count = len(x), len(model.layers)
        self._model, self._x, self._adaln, self._conditioning = model, x, adaln, conditioning
        self._places: Collection[int] = ()
        self._hints: Iterator[mx.array] = iter(())

    def output(self) -> mx.array:
        """The stream (B, S, D) after the last layer."""
        return self.run(self.enter(), 0, self.count, range(self.rows))

    def enter(self) -> mx.array:
        """The tokens of image and caption before the first layer, (B, S, D)."""
        model, conditioning = self._model, self._conditioning
        embedded = tokens = model.embed_image(self._x)  # (B, L, D)
        for block in model.noise_refiner:
            tokens = model.run(block, tokens, conditioning.layout.image_rotation, None, self._adaln)
        self._places, self._hints = hints_of(model, embedded, tokens, conditioning, self._adaln)
        return mx.concatenate([tokens, conditioning.caption], axis=1)  # (B, S, D)

    def run(self, stream: mx.array, first: int, end: int, rows: Sequence[int]) -> mx.array:
        """See `zimage_ref.model.step_cache.Layers`."""
        layout, model = self._conditioning.layout, self._model
        rotation, mask = self._rows_of(layout.rotation, rows), self._rows_of(layout.mask, rows)
        adaln = self._rows_of(self._adaln, rows)
        for i in range(first, end):
            stream = model.run(model.layers[i], stream, rotation, mask, adaln)
            stream = stream + self._rows_of(next(self._hints), rows) if i in self._places else stream
        return stream

    def _rows_of(self, tree: T, rows: Sequence[int]) -> T:
        """Some rows of the arrays in `tree` that have a row for each of the batch."""
        if len(rows) == self.rows:
            return tree
        chosen = mx.array(list(rows))
        return cast(T, tree_map(lambda a: a[chosen] if isinstance(a, mx.array) and len(a) > 1 else a, tree))

    def joined(self, rows: Sequence[mx.array]) -> mx.array:
        """See `zimage_ref.model.step_cache.Layers`."""
        return mx.concatenate(list(rows))

    def kept(self, stream: mx.array) -> mx.array:
        """See `zimage_ref.model.step_cache.Layers`."""
        mx.eval(stream)
        return stream

    def size(self, stream: mx.array, row: int) -> float:
        """See `zimage_ref.model.step_cache.Layers`."""
        return self._mean(mx.abs(stream[0].astype(mx.float32)).mean(axis=-1), row)

    def growth(self, stream: mx.array, before: mx.array, row: int) -> float:
        """See `zimage_ref.model.step_cache.Layers`."""
        lengths, earlier = (mx.linalg.norm(a[0].astype(mx.float32), axis=-1) for a in (stream, before))
        return self._mean(lengths / (earlier + 1e-8), row)

    def _mean(self, values: mx.array, row: int) -> float:
        """The mean of values (S,) over the tokens of a row, without those that fill up a shorter caption."""
        present = self._present(row)
        if present is None:
            return float(values.mean())
        return float(mx.where(present, values, 0).sum() / present.sum())

    def _present(self, row: int) -> mx.array | None:
        """Which tokens of a row any token attends to, (S,) boolean; None: all."""
        layout = self._conditioning.layout
        if not isinstance(layout.mask, tuple):
            return None if layout.mask is None else layout.mask[row, 0].any(axis=0)
        _, own, rotation, other = layout.mask
        L, S, N = (tables[0].shape[1] for tables in (layout.image_rotation, layout.rotation, rotation))
        return mx.concatenate([
            mx.ones(S, mx.bool_) if own is None else own[row, 0].any(axis=0),
            mx.ones(N - L, mx.bool_) if other is None else other[row, 0, 0, L:],
        ])  # fmt: skip
