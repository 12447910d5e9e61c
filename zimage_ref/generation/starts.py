"""The latents of the pictures that requests start from and follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.arrays import ArrayT
from zimage_ref.pictures.images import to_array

from .engine import ConditioningT, Engine
from .jobs import Request
from .tiles import Place

Steer = Callable[[ConditioningT, float, Place], ConditioningT]  # conditioning, sigma, tile -> what holds there


@dataclass(frozen=True)
class Start(Generic[ArrayT]):
    """The encoded pictures of a request."""

    latents: ArrayT | None  # (1, C, h, w), of the picture to start from
    context: ArrayT | None  # (1, control_in_dim, h, w), for the ControlNet


def starts_of(engine: Engine[ArrayT, ConditioningT], requests: Sequence[Request]) -> list[Start[ArrayT]]:
    """The start of each request. A picture is encoded once for requests that follow each other."""
    starts: list[Start[ArrayT]] = []
    before: tuple[object, ...] | None = None
    for request in requests:
        given = _given(request)
        starts.append(starts[-1] if given == before else start_of(engine, request))
        before = given
    return starts


def _given(request: Request) -> tuple[object, ...]:
    """The things that the start of `request` depends on.

    They are compared by value, because a grid reads a file anew for each value of an axis.
    """
    control = request.control
    if control is None or not control.scale:
        return request.picture, request.tile
    mask = None if request.mask is None else request.mask.tobytes()  # its sides are those of the pictures
    return request.picture, request.tile, control.picture, control.kind, control.file.stamp, mask


def start_of(engine: Engine[ArrayT, ConditioningT], request: Request) -> Start[ArrayT]:
    """That of one request."""

    def encode(pixels: Array) -> Array:
        return np.asarray(engine.encode(pixels, request.tiles))

    control, context = request.control, None
    if control is not None and control.scale:
        context = engine.to_backend(control.context(encode, request.picture, request.mask))
    latents = None if request.picture is None else engine.encode(to_array(request.picture)[None], request.tiles)
    return Start(latents, context)


def steering(engine: Engine[ArrayT, ConditioningT], request: Request, context: ArrayT | None) -> Steer[ConditioningT]:
    """A function that adds the ControlNet of `request` to a conditioning at the noise levels at which it acts."""
    control = request.control

    def steer(conditioning: ConditioningT, sigma: float, place: Place) -> ConditioningT:
        if control is None or context is None or not control.acts(sigma, request.sigmas):
            return conditioning
        return engine.controlled(conditioning, control.file, context[place.index()], control.scale)

    return steer
