"""The precision of the frozen base that a config comes to on this machine."""

from __future__ import annotations

from zimage_mlx.device import on_gpu
from zimage_ref.formats.quantize import GROUP_SIZE, Quantization
from zimage_ref.training.config import TrainConfig

_DTYPES = {"bf16": "bfloat16", "f32": "float32"}


def resolve_base_precision(config: TrainConfig) -> tuple[str, Quantization | None]:
    """The dtype of the networks by name, and how the base is quantized, None if it is not."""
    asked = config.base_precision
    bits, _, group_size = asked.partition("/")
    quantization = Quantization(int(bits), int(group_size or GROUP_SIZE)) if bits.isdecimal() else None
    default = "bf16" if on_gpu() else "f32"
    return _DTYPES.get(asked, _DTYPES[default]), quantization
