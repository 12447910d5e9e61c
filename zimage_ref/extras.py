"""Optional packages. An extra installs each; it is imported when a file or a model name needs it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .errors import BackendError

# package -> the extra of zimage-mlx that installs it
EXTRAS = {
    "gguf": "gguf", "huggingface_hub": "hub", "pillow_heif": "heif", "fastapi": "serve", "uvicorn": "serve",
    "python_multipart": "serve", "mcp": "mcp", "cv2": "control", "tensorboard": "tensorboard", "wandb": "wandb",
}  # fmt: skip


def optional_import(package: str, need: str) -> ModuleType:
    """Imports `package`, one of EXTRAS or a module in one. If it is missing, raises BackendError.

    The message is `need` and the way to install it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise BackendError(f"{need}: pip install 'zimage-mlx[{EXTRAS[package.partition('.')[0]]}]'") from error
