"""Models and LoRAs named by their repository on Hugging Face, such as Tongyi-MAI/Z-Image-Turbo (extra `hub`)."""

from __future__ import annotations

import re
from pathlib import Path

from zimage_ref.errors import ConfigError
from zimage_ref.extras import optional_import

TINY = "tiny"  # the name of the model inside this package, unless a folder has this name
BUILT_IN = Path(__file__).parents[1] / "tiny" / "weights"

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE = re.compile(rf"({_REPOSITORY.pattern}):([\w. /-]+\.safetensors)")
_FILES = ["*.json", "*.safetensors", "tokenizer/*"]


def resolved(path: Path) -> Path:
    """`path` if it exists, else the folder of the model with that name. Raises as `local_folder` does."""
    return local_folder(path) if _is_name(path) else path


def local_folder(model: str | Path) -> Path:
    """The folder of `model`: a folder itself, the built-in model, or the cache of the repository with this id.

    Missing files of a repository are downloaded.
    Raises ConfigError if there is no such model, BackendError if a repository needs a package that is not installed.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.as_posix() == TINY:
        if not BUILT_IN.is_dir():
            raise ConfigError(
                f"{TINY}: this package holds no weights of the small model: make them with "
                f"`python -m zimage_mlx.tiny --output DIR` (minutes on a GPU), then give DIR as `model_dir`"
            )
        return BUILT_IN
    if not _is_name(path):
        raise ConfigError(f"{path}: is not a folder: `model_dir` takes one that holds a Z-Image model")
    name = path.as_posix()
    hub = optional_import("huggingface_hub", f"{name}: is not a folder; to use it as a repository on Hugging Face")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
    except (OSError, ValueError, hub.errors.HfHubHTTPError):
        pass
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_FILES))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        fact = str(error).strip().split("\n")[0]
        raise ConfigError(f"{name}: is neither a folder nor a repository that can be downloaded: {fact}") from error


def local_file(path: Path) -> Path:
    """The file `path`; if there is none and it reads user/repository:file.safetensors, that file in the local cache.

    A file that is not in the cache is downloaded. Raises ConfigError if it cannot be, BackendError if a package for it
    is not installed.
    """
    found = None if path.exists() else _FILE.fullmatch(path.as_posix())
    if not found:
        return path
    name, repository, file = found[0], found[1], found[2]
    hub = optional_import("huggingface_hub", f"{name}: is not a file; to use it from a repository on Hugging Face")
    try:
        return Path(hub.hf_hub_download(repository, file, local_files_only=True))
    except (OSError, ValueError, hub.errors.HfHubHTTPError):
        pass
    try:
        return Path(hub.hf_hub_download(repository, file))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        fact = str(error).strip().split("\n")[0]
        raise ConfigError(f"{name}: is neither a file nor one that can be downloaded: {fact}") from error


def _is_name(model: Path) -> bool:
    name = model.as_posix()
    return not model.exists() and (name == TINY or _REPOSITORY.fullmatch(name) is not None)
