"""A fast BLAS for MLX on Linux, whose `mlx[cpu]` brings the reference BLAS: 70 times slower in matrix products.

A library with the standard names, loaded globally before MLX, takes the reference's place. On a Mac there is nothing
to do.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("libopenblas.so.0", "libblis.so.4", "libmkl_rt.so.2")
ADVICE = "MLX computes with a slow BLAS here; for a fast one: apt install libopenblas0-pthread (Debian, Ubuntu)"


@lru_cache(maxsize=1)
def preload() -> str | None:
    """Loads the first of `LIBRARIES` that this machine has; its name, or None. Call it before mlx is imported."""
    if not needed():
        return None
    for library in LIBRARIES:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return library
    return None


def advice() -> str | None:
    """How to make MLX fast here, in one line; None where it is, or is not there."""
    return ADVICE if needed() and preload() is None else None


def needed() -> bool:
    """Whether MLX is here with the reference BLAS, which comes in the package mlx-cpu."""
    try:
        return bool(version("mlx-cpu"))
    except PackageNotFoundError:
        return False
