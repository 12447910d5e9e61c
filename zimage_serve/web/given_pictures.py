"""Pictures in the fields of a request: the id of one that the server has, or the picture itself in base64."""

from __future__ import annotations

from collections.abc import Mapping

from zimage_serve.work.orders import PICTURES
from zimage_serve.work.studio import Studio

from .bodies import from_base64


def kept(picture: object, what: str, studio: Studio) -> str:
    """The id of a picture: `picture` itself if there is one with this id, else that of the picture in base64.

    Raises RefusedError or DatasetError naming `what`.
    """
    if isinstance(picture, str) and studio.store.has_picture(picture):
        return picture
    return studio.store.receive(from_base64(picture, what), f"`{what}`")[0]


def with_ids(fields: Mapping[str, object], studio: Studio) -> dict[str, object]:
    """`fields` of the own interface with ids in place of pictures in base64."""
    found = {name: kept(fields[name], name, studio) for name in PICTURES if fields.get(name) is not None}
    return {**fields, **found}
