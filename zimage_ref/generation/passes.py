"""The work on a batch of pictures: its passes of denoising, each in turns with other threads, and what is decoded.

The first pass denoises a batch together. The second, if there is one, enlarges its pictures and denoises each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.checks import check_finite
from zimage_ref.pictures.images import Picture, to_picture, to_unit

from .denoising import DenoisingStep, denoised
from .engine import ConditioningT, Engine, Terms
from .jobs import Request
from .starts import Start, start_of
from .steering import predictions_in
from .tiles import Tiles

Output = Literal["pil", "array", "latents"]
StepOf = tuple[range, DenoisingStep[ArrayT]]  # the indices of the pictures in a batch, from 0, and their step


@dataclass(frozen=True)
class Passes(Generic[ArrayT, ConditioningT]):
    """The way of a batch through the networks."""

    engine: Engine[ArrayT, ConditioningT]
    captions: Mapping[str, ArrayT]  # features (T, cap_feat_dim) by text
    terms: Terms
    apart: bool  # whether transformer and autoencoder do not fit into memory together
    unit_done: Callable[[], None] = lambda: None  # is called after each of the `units_of` a batch

    def steps(self, batch: Sequence[Request], start: Start[ArrayT]) -> Iterator[StepOf[ArrayT]]:
        """Yields the steps of all passes. start: what was encoded for the batch."""
        x: ArrayT | None = None
        for step in self._denoised(batch, start):
            x = step.x
            yield range(len(batch)), step
        second = batch[0].second
        if x is None or second is None:
            return
        done_with(self.engine, "transformer", self.apart)
        seconds = []
        for i, request in enumerate(batch):
            with self.engine.turn():
                large = second.begun_from(to_picture(self.pixels(request, x[i : i + 1])), request.config)
                seconds.append((large, start_of(self.engine, large)))
        done_with(self.engine, "vae", self.apart)
        for i, (large, own) in enumerate(seconds):
            for step in self._denoised([large], own):
                yield range(i, i + 1), step

    def _denoised(self, batch: Sequence[Request], start: Start[ArrayT]) -> Iterator[DenoisingStep[ArrayT]]:
        whole = batch[0].tiles.single
        every = self.unit_done if not whole else lambda: None
        terms = self.terms.scaled(batch[0].config.lora_scale)
        for step in in_turns(self.engine, denoised(self.engine, batch, self.captions, start, every), terms):
            yield step
            if whole:
                self.unit_done()

    def finished(self, request: Request, x: ArrayT, output: Output) -> Picture | Array:
        """What `output` names of the latents x (1, C, h, w) of the last pass of `request`."""
        if output == "latents":
            latents: Array = np.asarray(x, np.float32)[0]
            return latents
        pixels = self.pixels(request.result, x)
        return to_picture(pixels) if output == "pil" else pixels

    def pixels(self, request: Request, x: ArrayT) -> Array:
        """The picture (H, W, 3) in 0..1 of the latents x (1, C, h, w) of a pass, with what a mask keeps."""
        pixels = decoded(self.engine, x, request.tiles)
        if request.picture is not None and request.mask is not None:
            pixels = np.where(request.mask[..., None], pixels, np.asarray(request.picture, np.float32) / 255)
        return pixels


def units_of(batch: Sequence[Request]) -> int:
    """The units of progress in all passes of a batch: steps, or tiles of them."""
    count = len(batch[0].sigmas) - 1 if batch[0].tiles.single else predictions_in(batch[0])
    second = batch[0].second
    return count + (len(batch) * units_of([second]) if second else 0)


def in_turns(
    engine: Engine[ArrayT, ConditioningT], steps: Iterator[DenoisingStep[ArrayT]], terms: Terms
) -> Iterator[DenoisingStep[ArrayT]]:
    """Yields `steps`. Each is computed in a turn of its own, so other requests can compute between two steps."""
    while True:
        with engine.turn(terms):
            step = next(steps, None)
            if step is None:
                return
            engine.settle(step.x_0)  # another thread may compute while this step is looked at
            check_finite(f"the latents after step {step.index} of {step.total}", np.asarray(step.x))
        yield step


def decoded(engine: Engine[ArrayT, ConditioningT], x: ArrayT, tiles: Tiles | None = None) -> Array:
    """Latents (1, C, h, w) as (H, W, 3) in 0..1. Raises ConfigError if the picture is not finite."""
    pixels = engine.decode(x, tiles)
    check_finite("the pixels of this picture", pixels)  # it would be a black picture
    return to_unit(pixels)


def done_with(engine: Engine[ArrayT, ConditioningT], component: str, free: bool) -> None:
    """Frees the memory of `component` if `free`."""
    if free:
        with engine.turn():
            engine.release(component)
