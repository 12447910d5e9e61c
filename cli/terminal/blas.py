"""Loads a fast BLAS for MLX on Linux. `mlx[cpu]` contains the reference BLAS, 70 times slower in matrix products.

If a BLAS library with the standard names is loaded globally before MLX, MLX uses it instead of the reference BLAS.
A Mac does not need this.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("libopenblas.so.0", "libblis.so.4", "libmkl_rt.so.2")
ADVICE = "MLX computes with a slow BLAS here; for a fast one: apt install libopenblas0-pthread (Debian, Ubuntu)"


@lru_cache(maxsize=1)
def preload() -> str | None:
    """Loads the first of `LIBRARIES` that this machine has. Gives its name, or None. Call it before mlx is imported."""
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
    """One line that says how to make MLX fast here. None if MLX is fast already or is not installed."""
    return ADVICE if needed() and preload() is None else None


def needed() -> bool:
    """Whether MLX is installed with the reference BLAS, which is in the package mlx-cpu."""
    try:
        return bool(version("mlx-cpu"))
    except PackageNotFoundError:
        return False
