"""The frozen base in the precision that a config asks for."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zimage_ref.train_config import TrainConfig

from .pipeline import ZImagePipeline
from .transformer import Transformer

_GROUPS = (64, 32)  # weights that share a scale, in order of preference


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


def load_base(pipeline: ZImagePipeline, bits: int | None) -> Transformer:
    """The transformer of `pipeline`, the Linear layers of its blocks quantized to `bits`."""
    model = pipeline.transformer
    if bits:

        def groups(path: str, module: nn.Module) -> Any:
            if not isinstance(module, nn.Linear) or not path.startswith(("layers.", "noise_refiner.", "context_")):
                return False
            size = next((size for size in _GROUPS if module.weight.shape[1] % size == 0), 0)
            return {"group_size": size, "bits": bits} if size else False

        nn.quantize(model, class_predicate=groups)
        mx.eval(model.parameters())
    return model
