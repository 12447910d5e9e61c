"""Every error that a user can cause, one hierarchy.

    ZImageError
    ├── FormatError     a file is not what it claims to be
    ├── WeightError     names, shapes or values of weights do not fit the model
    ├── ConfigError     a config file, or an option, has a value this program cannot honour
    ├── DatasetError    pictures or captions to train on are missing or unreadable
    ├── TrainingError   a run cannot go on: the loss is not finite, the disk is full, another run is at it
    └── BackendError    the work asked for needs software that is not installed, or the GPU has failed

Each message is one line that names the file, the fact and the way out. Anything else that is raised is a bug.
Options are named as fields, in backticks: "`strength` needs `init_image`". The command line shows them as its flags.
"""

from collections.abc import Iterable


class ZImageError(Exception):
    """Base of all errors caused by input; the command line prints it as one line and exits with 1."""

    def __str__(self) -> str:
        """The message in one printable line, whatever a damaged file calls its tensors."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class FormatError(ZImageError):
    """A file is damaged, or is not in the format its name or header claims."""


class WeightError(ZImageError):
    """Weights do not fit the model: unknown, missing or wrongly shaped tensors."""


class ConfigError(ZImageError):
    """A configuration or an option has a value that this program cannot honour."""


class DatasetError(ZImageError):
    """The pictures or captions to train on are missing or unreadable."""


class TrainingError(ZImageError):
    """A training run cannot start or go on as it is; what it has saved is safe."""


class BackendError(ZImageError):
    """The work asked for needs software that is not installed here, or the GPU has failed."""


def reason(error: Exception) -> str:
    """What `error` says went wrong, without the number and the file's name that the operating system's errors add."""
    return getattr(error, "strerror", None) or str(error)


def listing(items: Iterable[str], limit: int = 10) -> str:
    """The first `limit` items, comma separated, and how many more there are."""
    items = list(items)
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
