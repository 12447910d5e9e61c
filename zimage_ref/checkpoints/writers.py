"""Who wrote a file: told by its metadata, and by the files and tensors that only one program writes.

Sources: the savers of mflux, Z-Image.swift, mlx-gen, mlx-lm, ComfyUI, musubi-tuner, diffusers, in 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from zimage_ref.errors import FormatError
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.folding import METADATA
from zimage_ref.formats.json_file import JsonObject, read_json
from zimage_ref.formats.layouts import BY_NAME
from zimage_ref.formats.quantize import QuantizedTensor

from .component import CONFIG_FILE

_SWIFT_RECORD = "quantization.json"  # at the root of a folder


def _json(path: Path) -> JsonObject:
    try:
        return read_json(path) if path.is_file() else {}
    except FormatError:
        return {}  # whoever needs the file says what is wrong with it


def _mflux(file: Checkpoint) -> str:
    if "quantization_level" not in file.metadata:
        return ""
    return f"mflux {file.metadata.get('mflux_version', '')}".strip()


def _zimage(file: Checkpoint) -> str:
    return "zimage" if {"model_type", "source"} <= file.record.keys() else ""


def _affine(file: Checkpoint) -> bool:
    return any(isinstance(tensor, QuantizedTensor) for tensor in file.tensors.values())


def _swift(file: Checkpoint) -> str:
    record = _json(file.path.parent.parent / _SWIFT_RECORD) or _json(file.path.parent / _SWIFT_RECORD)
    return "Z-Image.swift" if {"bits", "group_size", "layers"} <= record.keys() else ""


def _mlx_config(file: Checkpoint) -> str:
    config = _json(file.path.parent / CONFIG_FILE)
    if not _affine(file) or "quantization" not in config:
        return ""
    whole = (file.path.parent.parent / "model_index.json").is_file()  # mlx-gen copies the rest of the model
    return "mlx-gen" if whole or "_class_name" in config else "mlx-lm"


def _comfy(file: Checkpoint) -> str:
    packed = any(tensor.storage in BY_NAME for tensor in file.tensors.values())
    return "ComfyUI" if METADATA in file.metadata or packed else ""


def _gguf(file: Checkpoint) -> str:
    if file.container != "gguf":
        return ""
    by = file.metadata.get("general.quantized_by") or file.metadata.get("general.author")
    return str(by) if by else "a GGUF converter"


def _burn(file: Checkpoint) -> str:
    return "burn" if file.container == "burnpack" else ""


def _mlx(file: Checkpoint) -> str:
    return "a program on MLX" if _affine(file) else ""


# The first that answers has written the file
WRITERS: tuple[Callable[[Checkpoint], str], ...] = (
    _mflux, _zimage, _swift, _mlx_config, _comfy, _gguf, _burn, _mlx,
)  # fmt: skip


def written_by(file: Checkpoint) -> str:
    """The program that wrote `file`, for people. "" if nothing tells."""
    return next((name for writer in WRITERS if (name := writer(file))), "")
