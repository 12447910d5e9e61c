"""The two engines behind one choice: MLX where it is installed, NumPy anywhere."""

from __future__ import annotations

from types import ModuleType

import zimage_ref
from zimage_ref import BackendError
from zimage_ref.generation.pipeline import AnyPipeline

from . import blas

mlx: ModuleType | None
blas.preload()
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


def pipeline(backend: str) -> type[AnyPipeline]:
    """The pipeline class of `backend`, mlx or numpy. Raises BackendError where MLX is not installed."""
    package = zimage_ref if backend == "numpy" else require_mlx("--backend mlx")
    chosen: type[AnyPipeline] = package.ZImagePipeline
    return chosen
