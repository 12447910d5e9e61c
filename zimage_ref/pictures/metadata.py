"""The record in a picture file: how the picture was made, with all that is needed to make it again.

    PNG          text chunks "zimage" (JSON) and "parameters" (one line of text that other tools show)
    JPEG, WEBP   EXIF UserComment, the same JSON

The record is a flat JSON object: the fields of GenerateConfig, and the fields that `provenance` adds.
Sources: PNG, ISO/IEC 15948, tEXt and iTXt; EXIF 2.3, tag 37510.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from zimage_ref.errors import FormatError

from .files import opened

Record = Mapping[str, Any]
KEY = "zimage"
_UNICODE = b"UNICODE\0"  # a UserComment begins with this if UTF-16 follows
_EXIF_LIMIT = 65_000  # bytes; a JPEG segment holds 65,533


def metadata(format: str, record: Record) -> dict[str, Any]:
    """Options of Pillow's `save` that put `record` into a file of `format` (PNG, JPEG, WEBP)."""
    text = _json(record)
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(KEY, text)
        info.add_itxt("parameters", parameters(record).encode(errors="backslashreplace").decode())
        return {"pnginfo": info}
    comment = _UNICODE + text.encode("utf-16-be")
    if len(comment) > _EXIF_LIMIT:
        raise FormatError(
            f"{len(text)} characters of metadata do not fit a {format}: write a PNG or give `no_metadata`"
        )
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}  # older Pillows ignore changes to what get_ifd gives
    return {"exif": exif}


def _json(record: Record) -> str:
    """`record` as JSON. A path that is not valid Unicode is written with escapes, so that it can be read again."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def read_record(path: Path) -> dict[str, Any]:
    """The record in the picture `path`.

    Raises FormatError if it is not a picture, or holds no record of this program.
    """
    with opened(path) as file:
        text = file.info.get(KEY) or _user_comment(file)
    try:
        record = json.loads(text) if text else None
    except (ValueError, TypeError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise FormatError(f"{path}: does not say how it was made: it has no metadata of `zimage generate`")
    return record


def parameters(record: Record) -> str:
    """The record in the text form that other programs for generated pictures show."""
    lines = [str(record.get("prompt", ""))]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    facts = {
        "Steps": record.get("steps"),
        "Sampler": record.get("sampler"),
        "CFG scale": record.get("guidance"),
        "Seed": record.get("seed"),
        "Size": f"{record.get('width')}x{record.get('height')}",
        "Model": Path(str(record.get("model", ""))).name,
        "Lora": ", ".join(f"{Path(lora['file']).stem}:{lora['scale']:g}" for lora in record.get("loras", ())) or None,
        "Version": record.get("version"),
    }
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)])


def _user_comment(file: Image.Image) -> str:
    comment = file.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return ""
    return comment[len(_UNICODE) :].decode("utf-16-be")
