"""The choice of an engine: MLX if it is installed, NumPy on any machine. An engine is imported when it is used."""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import zimage_mlx
import zimage_ref
from zimage_ref.errors import BackendError
from zimage_ref.options import one_of

if TYPE_CHECKING:
    from zimage_ref.generation.pipeline import AnyPipeline


def _mlx_is_installed() -> bool:
    try:
        return find_spec("mlx.core") is not None  # `mlx` alone could be any folder with that name
    except ModuleNotFoundError:
        return False


OLDEST_MACOS = 14  # that MLX runs on
BACKENDS = ("mlx", "numpy")
DEFAULT = "mlx" if _mlx_is_installed() else "numpy"


def require_mlx(work: str) -> ModuleType:
    """Imports `zimage_mlx` and MLX. Raises BackendError if MLX is not installed or does not load."""
    if DEFAULT != "mlx":
        if sys.platform == "darwin":
            raise BackendError(f"{work} needs MLX, which is not installed: {_lacking()}")
        raise BackendError(
            f"{work} needs MLX, which is not installed: pip install 'zimage-mlx[cpu]' on Linux, "
            f"'zimage-mlx[cuda]' with an NVIDIA GPU; on an Apple Silicon Mac it comes by itself"
        )
    try:
        import_module("zimage_mlx.device")
    except ImportError as error:
        raise BackendError(f"{work} needs MLX, which is installed but does not load: {error}") from error
    return zimage_mlx


def _lacking() -> str:
    """The requirement of MLX that this Mac does not meet."""
    version = platform.mac_ver()[0]
    if platform.machine() != "arm64":
        return (
            f"it needs Apple Silicon and a native arm64 Python, and this Python is of {platform.machine()}: on Apple "
            f"Silicon install one from python.org or with Homebrew, and make the environment anew"
        )
    if version and int(version.split(".")[0]) < OLDEST_MACOS:
        return f"it needs macOS {OLDEST_MACOS}, and this is {version}: update macOS"
    return "pip install zimage-mlx once more"


def pipeline(backend: str) -> type[AnyPipeline]:
    """The pipeline class of `backend`, "mlx" or "numpy". Raises BackendError as `require_mlx` does."""
    one_of("backend", backend, BACKENDS)  # a record may name any
    package = zimage_ref if backend == "numpy" else require_mlx("--backend mlx")
    chosen: type[AnyPipeline] = package.ZImagePipeline
    return chosen
