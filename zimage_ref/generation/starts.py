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

Steer = Callable[[ConditioningT, float], ConditioningT]  # conditioning, sigma -> the conditioning at this sigma


@dataclass(frozen=True)
class Start(Generic[ArrayT]):
    """The encoded pictures of a request."""

    latents: ArrayT | None  # (1, C, h, w), of the picture to start from
    context: ArrayT | None  # (1, control_in_dim, h, w), for the ControlNet


def starts_of(engine: Engine[ArrayT, ConditioningT], requests: Sequence[Request]) -> list[Start[ArrayT]]:
    """The start of each request. A picture is encoded once: `plan_requests` reads a file once."""
    starts: list[Start[ArrayT]] = []
    before: Request | None = None
    for request in requests:
        if before is not None and request.picture is before.picture and request.control is before.control:
            starts.append(starts[-1])
        else:
            starts.append(_start(engine, request))
        before = request
    return starts


def _start(engine: Engine[ArrayT, ConditioningT], request: Request) -> Start[ArrayT]:
    def encode(pixels: Array) -> Array:
        return np.asarray(engine.encode(pixels))

    control, context = request.control, None
    if control is not None and control.scale:
        context = engine.to_backend(control.context(encode, request.picture, request.mask))
    latents = None if request.picture is None else engine.encode(to_array(request.picture)[None])
    return Start(latents, context)


def steering(engine: Engine[ArrayT, ConditioningT], request: Request, context: ArrayT | None) -> Steer[ConditioningT]:
    """A function that adds the ControlNet of `request` to a conditioning at the noise levels at which it acts."""
    control = request.control

    def steer(conditioning: ConditioningT, sigma: float) -> ConditioningT:
        if control is None or context is None or not control.acts(sigma, request.sigmas):
            return conditioning
        return engine.controlled(conditioning, control.file, context, control.scale)

    return steer
