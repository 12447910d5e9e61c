"""The choice of an engine: MLX if it is installed, NumPy on any machine. An engine is imported when it is used."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import zimage_mlx
import zimage_ref
from zimage_ref.errors import BackendError

from . import blas

if TYPE_CHECKING:
    from zimage_ref.generation.pipeline import AnyPipeline


def _mlx_is_installed() -> bool:
    try:
        return find_spec("mlx.core") is not None  # `mlx` alone could be any folder with that name
    except ModuleNotFoundError:
        return False


BACKENDS = ("mlx", "numpy")
DEFAULT = "mlx" if _mlx_is_installed() else "numpy"


def require_mlx(work: str) -> ModuleType:
    """Imports `zimage_mlx` and MLX. Raises BackendError if MLX is not installed or does not load."""
    if DEFAULT != "mlx":
        raise BackendError(
            f"{work} needs MLX, which is not installed: pip install 'zimage-mlx[cpu]' on Linux, "
            f"'zimage-mlx[cuda]' with an NVIDIA GPU; on an Apple Silicon Mac it comes by itself"
        )
    blas.preload()
    try:
        import_module("zimage_mlx.device")
    except ImportError as error:
        raise BackendError(f"{work} needs MLX, which is installed but does not load: {error}") from error
    return zimage_mlx


def pipeline(backend: str) -> type[AnyPipeline]:
    """The pipeline class of `backend`, "mlx" or "numpy". Raises BackendError as `require_mlx` does."""
    package = zimage_ref if backend == "numpy" else require_mlx("--backend mlx")
    chosen: type[AnyPipeline] = package.ZImagePipeline
    return chosen
