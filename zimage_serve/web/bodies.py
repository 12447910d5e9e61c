"""Bodies of requests: JSON objects, and pictures as base64 or files."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re

from fastapi import Request

from zimage_ref.formats.json_file import JsonObject
from zimage_serve.refusals import RefusedError

_DATA_URL = re.compile(r"data:[\w/+.-]*;base64,")
FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}  # as clients name them -> Pillow's name
MEDIA = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


async def json_object(request: Request) -> JsonObject:
    """The JSON object in the body. It must be declared as JSON, which a form of another site cannot do."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError("the body must be JSON, with Content-Type: application/json")
    try:
        body = json.loads(await request.body(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        raise RefusedError("the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise RefusedError("the body must be a JSON object")
    return body


def _finite(text: str) -> float:
    """The number in `text`. Raises ValueError if it is not finite: JSON has no such numbers."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def from_base64(text: object, what: str) -> bytes:
    """The bytes in `text`, base64 with or without the start of a data URL. Raises RefusedError naming `what`."""
    if not isinstance(text, str):
        raise RefusedError(f"`{what}` must be a picture in base64")
    try:
        return base64.b64decode(_DATA_URL.sub("", text[:100], count=1) + text[100:], validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(f"`{what}` is not valid base64") from None


def to_base64(data: bytes) -> str:
    """`data` as base64."""
    return base64.b64encode(data).decode()


def picture_format(name: object) -> str:
    """Pillow's name of the format that a client asks for. Raises RefusedError."""
    if str(name).lower() not in FORMATS:
        raise RefusedError(f"`{name}` is not a format of pictures here: known are {', '.join(FORMATS)}")
    return FORMATS[str(name).lower()]
