"""The files that mflux-save writes for each network: numbered shards, an index, no config.json.

mflux takes a folder as its own if the metadata of its files names `quantization_level`. It finds bits and group of each
layer by the shapes, and leaves a layer without scales as it is.
Source: mflux 0.24.0, common/weights/saving/model_saver.py and loading/weight_loader.py.
"""

from __future__ import annotations

from .dialects import FileStyle

VERSION = "0.24.0"  # of the mflux whose rules these are


def _shard(number: int, count: int) -> str:
    return f"{number}.safetensors"


def _metadata(bits: int | None) -> dict[str, str]:
    return {"quantization_level": str(bits), "mflux_version": VERSION}


MFLUX_FILES = FileStyle("model", _shard, 2 << 30, _metadata)
