"""Loads a fast BLAS for MLX on Linux. `mlx[cpu]` contains the reference BLAS, 70 times slower in matrix products.

If a BLAS library with the standard names is loaded globally before MLX, MLX uses it instead of the reference BLAS.
A Mac does not need this. This module does not import MLX.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

LIBRARIES = ("libopenblas.so.0", "libblis.so.4", "libmkl_rt.so.2")  # of the system
PACKAGED = ("opencv_python*.libs/libopenblas*.so", "cmeel.prefix/lib/libopenblas.so.0")  # in packages of Python
REFERENCE = "mlx_cpu.libs"  # the folder of the reference BLAS
ADVICE = (
    "MLX computes with a slow BLAS here; for a fast one: apt install libopenblas0-pthread (Debian, Ubuntu), or "
    "pip install opencv-python-headless, which contains it"
)


@lru_cache(maxsize=1)
def preload() -> str | None:
    """Loads the first fast BLAS that this machine has, of the system or in a package. Returns its name, or None.

    Call it before mlx is imported.
    """
    if not needed():
        return None
    for library in chain(LIBRARIES, _found(*PACKAGED)):
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
    """Whether MLX is installed with the reference BLAS."""
    return sys.platform == "linux" and any(_found(REFERENCE))


def _found(*patterns: str) -> Iterator[str]:
    """Files and folders under one of `patterns`, in the folders of Python's packages."""
    for pattern in patterns:
        for folder in sys.path:
            yield from map(str, sorted(Path(folder).glob(pattern)))
