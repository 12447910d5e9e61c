"""A fast BLAS for MLX on Linux, whose `mlx[cpu]` brings the reference BLAS: 70 times slower in matrix products.

A library with the standard names, loaded globally before MLX, takes the reference's place. On a Mac there is nothing
to do.
"""

from __future__ import annotations

import ctypes
import sys

LIBRARIES = ("libopenblas.so.0", "libblis.so.4", "libmkl_rt.so.2")
ADVICE = "MLX computes on this CPU with a slow BLAS; a fast one: apt install libopenblas0-pthread (Debian, Ubuntu)"


def preload() -> str | None:
    """Loads the first of `LIBRARIES` that this machine has; its name, or None. Call it before mlx is imported."""
    if not sys.platform.startswith("linux"):
        return None
    for library in LIBRARIES:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return library
    return None
