"""What MLX computes on, how much memory it may use there, and what comes back: results and errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from zimage_ref.errors import BackendError, TrainingError, ZImageError
from zimage_ref.memory import Mode

_METAL = ("[METAL]", "[metal::")  # that MLX's errors from Metal are marked with
_RELAXED = "set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"  # an environment variable that makes macOS more patient
# A word in the error -> what has happened, and the way out
_NO_MEMORY = "the GPU has no memory left: take a smaller size, fewer bits or `memory` lean"
_CAUSES = {
    "Insufficient Memory": _NO_MEMORY,
    "OutOfMemory": _NO_MEMORY,
    "[metal::malloc]": _NO_MEMORY,
    "Interactivity": f"macOS ended the work because the screen had to wait: let the display sleep, or {_RELAXED}",
    "Timeout": f"macOS ended the work because it took the GPU too long: take a smaller size, or {_RELAXED}",
}
_UNKNOWN = "the GPU has failed: start again"
_RESUME = "; `resume` goes on from the last save"

_LEAN_CACHE = 10**9  # bytes of freed memory that MLX keeps for reuse on Metal
_STREAM_CACHE = 1 << 28  # the same in the mode stream, on any device
_usual_cache: list[int] = []  # the limit that the mode stream replaced
_CACHE_SHARE = 10  # not lean: a tenth of the limit


def on_gpu() -> bool:
    """Whether MLX computes on a GPU, Metal or CUDA."""
    return bool(mx.default_device().type == mx.gpu)


def on_metal() -> bool:
    """Whether MLX computes on the GPU of a Mac. Modules ask through `device`, so that a test can answer for all."""
    return on_gpu() and bool(mx.metal.is_available())


def gpu_memory() -> int | None:
    """Bytes that the GPU may use, None if there is no GPU or it does not say.

    Metal gives no more than it recommends: about two thirds of a small Mac's memory. More than that is an error.
    """
    if not on_gpu():
        return None
    info = mx.device_info(mx.gpu)
    return int(info.get("max_recommended_working_set_size") or info.get("total_memory") or 0) or None


def limit_memory(mode: Mode) -> None:
    """Keeps MLX within the GPU's memory on Metal, and limits what it holds of freed memory, less in the mode lean.

    The GPU of a Mac shares the memory with all programs. Left alone, MLX would plan for half as much again as Metal
    gives, and keep nearly all that it ever used. The mode stream is for little memory on any device.
    """
    limit = gpu_memory() if on_metal() else None
    if limit:
        mx.set_memory_limit(limit)
    if mode == "stream":
        before = mx.set_cache_limit(_STREAM_CACHE)
        _usual_cache[:] = _usual_cache or [before]
    elif limit:
        mx.set_cache_limit(limit // _CACHE_SHARE if mode == "fast" else _LEAN_CACHE)
    elif _usual_cache:
        mx.set_cache_limit(_usual_cache.pop())


@contextmanager
def gpu_errors_explained(training: bool = False) -> Iterator[None]:
    """A block in which an error of Metal becomes one line with the way out, a TrainingError or a BackendError.

    MLX raises it when the next result is read, and every result after that fails, too: the process has to end.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(mark in text for mark in _METAL):
            raise
        cause = next((cause for word, cause in _CAUSES.items() if word in text), _UNKNOWN)
        kind: type[ZImageError] = TrainingError if training else BackendError
        raise kind(f"{cause}{_RESUME if training else ''}: {text}") from error


def multiply_in_float32() -> None:
    """Makes float32 mean float32: on an M5 and on CUDA, MLX would take 10 of 23 bits of what it multiplies.

    To be called before the first product: MLX reads this once. A setting of the user's stays.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


def give_memory_back_early() -> None:
    """Makes MLX on CUDA free what it used after a few operations. By itself, it waits longer.

    On Metal its command buffers end after 40 MiB by themselves. To be called before the first product: MLX reads this
    once. Settings of the user's stay. Small pictures become slower.
    """
    if on_gpu() and not on_metal():
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "5")
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "50")


def number(scalar: mx.array) -> float:
    """A scalar array as a Python float."""
    return float(np.array(scalar))
