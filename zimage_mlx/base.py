"""The frozen base in the precision that a config asks for."""

from __future__ import annotations

import mlx.core as mx

from zimage_ref.train_config import TrainConfig


def base_precision(config: TrainConfig) -> tuple[str | None, int | None]:
    """The pipeline's dtype (None: the backend's default) and the bits to quantize to (None: not at all)."""
    precision = config.base_precision
    if precision in ("8", "4"):
        return None, int(precision)
    return {"auto": None, "bf16": "bfloat16", "f32": "float32"}[precision], None


def precision_name(config: TrainConfig) -> str:
    """The precision that `config` comes to here: bf16, f32, 8 or 4."""
    if config.base_precision != "auto":
        return config.base_precision
    return "bf16" if mx.default_device().type == mx.gpu else "f32"
