"""The two engines behind one choice: MLX where it is installed, NumPy anywhere."""

from __future__ import annotations

import sys
from types import ModuleType

import zimage_ref
from zimage_ref import BackendError
from zimage_ref.generation import Pipeline

from . import blas

FAST_BLAS = blas.preload()

mlx: ModuleType | None
try:
    import zimage_mlx as mlx
except ImportError as error:
    if not (error.name or "").startswith("mlx"):
        raise
    mlx = None

BACKENDS = ("mlx", "numpy")
DEFAULT = "mlx" if mlx else "numpy"


def require_mlx(work: str) -> ModuleType:
    """The package `zimage_mlx`. Raises BackendError where MLX is not installed."""
    if mlx is None:
        raise BackendError(
            f"{work} needs MLX, which is not installed: pip install 'zimage-mlx[cpu]' on Linux, "
            f"'zimage-mlx[cuda]' with an NVIDIA GPU; on an Apple Silicon Mac it comes by itself"
        )
    return mlx


def pipeline(backend: str) -> type[Pipeline]:
    """The pipeline class of `backend`, mlx or numpy. Raises BackendError where MLX is not installed."""
    package = zimage_ref if backend == "numpy" else require_mlx("--backend mlx")
    chosen: type[Pipeline] = package.ZImagePipeline
    return chosen


def advice() -> str | None:
    """One line on how to make MLX faster here, or None where there is nothing to say."""
    if mlx is None or FAST_BLAS or not sys.platform.startswith("linux") or mlx.on_gpu():
        return None
    return blas.ADVICE
