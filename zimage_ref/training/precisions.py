"""The precisions of the base model in training."""

from __future__ import annotations

from zimage_ref.formats.quantize import BITS, GROUP_SIZE, GROUP_SIZES

FLOATS = ("auto", "bf16", "f32")
PRECISIONS = (  # 4/32 is 4 bits in groups of 32
    *FLOATS, *map(str, reversed(BITS)),
    *(f"{bits}/{group}" for bits in reversed(BITS) for group in GROUP_SIZES if group != GROUP_SIZE),
)  # fmt: skip
