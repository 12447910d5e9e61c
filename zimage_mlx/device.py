"""What MLX computes on, how much memory it may use there, and how a result comes back from there."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

_LEAN_CACHE = 10**9  # bytes of freed memory that MLX keeps for reuse on Metal
_CACHE_SHARE = 10  # not lean: a tenth of the limit


def on_gpu() -> bool:
    """Whether MLX computes on a GPU, Metal or CUDA."""
    return bool(mx.default_device().type == mx.gpu)


def on_metal() -> bool:
    """Whether MLX computes on the GPU of a Mac. Modules ask through `device`, so that a test can answer for all."""
    return on_gpu() and bool(mx.metal.is_available())


def gpu_memory() -> int | None:
    """Bytes that the GPU may use, None if there is no GPU or it does not say.

    Metal gives no more than it recommends: about two thirds of a small Mac's memory. What exceeds that is an error.
    """
    if not on_gpu():
        return None
    info = mx.device_info(mx.gpu)
    return int(info.get("max_recommended_working_set_size") or info.get("total_memory") or 0) or None


def limit_memory(lean: bool) -> None:
    """Keeps MLX within the GPU's memory on Metal, and limits what it holds of freed memory; less if `lean`.

    The GPU of a Mac shares the memory with all programs. Left alone, MLX would plan for half as much again as Metal
    gives, and keep nearly all that it ever used.
    """
    limit = gpu_memory() if on_metal() else None
    if limit:
        mx.set_memory_limit(limit)
        mx.set_cache_limit(_LEAN_CACHE if lean else limit // _CACHE_SHARE)


def number(scalar: mx.array) -> float:
    """A scalar array as a Python float."""
    return float(np.array(scalar))
