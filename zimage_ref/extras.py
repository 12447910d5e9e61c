"""Packages that this one does not require: an extra installs each, and it is imported when a file or name needs it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .errors import BackendError

EXTRAS = {"gguf": "gguf", "huggingface_hub": "hub"}  # package -> the extra of zimage-mlx that installs it


def optional_import(package: str, need: str) -> ModuleType:
    """The package, one of EXTRAS. Raises BackendError, `need` and how to install it, if it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise BackendError(f"{need}: pip install 'zimage-mlx[{EXTRAS[package]}]'") from error
