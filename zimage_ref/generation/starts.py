"""The latents of the pictures that requests start from."""

from __future__ import annotations

from collections.abc import Sequence

from zimage_ref.model.arrays import ArrayT
from zimage_ref.pictures.images import Picture, to_array

from .engine import ConditioningT, Engine
from .jobs import Request


def starting_latents(engine: Engine[ArrayT, ConditioningT], requests: Sequence[Request]) -> list[ArrayT | None]:
    """The latents (1, C, h, w) of the picture that each request starts from, or None. A picture is encoded once."""
    starts: list[ArrayT | None] = []
    before: Picture | None = None
    for request in requests:
        picture = request.picture
        if picture is None:
            starts.append(None)
        elif picture is before or picture == before:  # a grid reads a file anew for each value of an axis
            starts.append(starts[-1])
        else:
            starts.append(engine.encode(to_array(picture)[None]))
        before = picture
    return starts
