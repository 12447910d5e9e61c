"""All errors that a user can cause, in one hierarchy.

    ZImageError
    ├── FormatError     a file is damaged, or is not in the format that it claims
    ├── WeightError     names, shapes or values of weights do not fit the model
    ├── ConfigError     a config file or an option has a value that this program cannot use
    ├── DatasetError    pictures or captions to train on are missing or unreadable
    ├── TrainingError   a run cannot start or continue: loss not finite, disk full, another run with the same output
    └── BackendError    the work needs software that is not installed, or the GPU has failed

A message is one line. It names the file, the fact and the way out. An exception of another class is a bug.
Messages name options as fields in backticks: "`strength` needs `init_image`". The command line shows them as flags.
"""

import unicodedata
from collections.abc import Iterable


class ZImageError(Exception):
    """The base of all errors that input can cause. The command line prints it as one line and exits with 1."""

    def __str__(self) -> str:
        """The message as one printable line, even if the names of tensors in a damaged file are not printable."""
        return printable(super().__str__(), keep="")


class FormatError(ZImageError):
    """A file is damaged, or is not in the format that its name or header claims."""


class WeightError(ZImageError):
    """Weights do not fit the model: unknown, missing or wrongly shaped tensors."""


class ConfigError(ZImageError):
    """A config file or an option has a value that this program cannot use."""


class DatasetError(ZImageError):
    """The pictures or captions to train on are missing or unreadable."""


class TrainingError(ZImageError):
    """A training run cannot start or continue. Its saved files are safe."""


class BackendError(ZImageError):
    """The work needs software that is not installed, or the GPU has failed."""


_JOINERS = "\u200c\u200d"  # they are inside of words and emoji


def printable(text: str, keep: str = "\n\t") -> str:
    """`text` with an escape for each character that could control a terminal. `keep`: characters that stay."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep or c in _JOINERS or unicodedata.category(c) == "Zs" else repr(c)[1:-1]
        for c in text
    )


def reason(error: Exception) -> str:
    """The message of `error`, without the number and the file name that errors of the operating system add."""
    return getattr(error, "strerror", None) or str(error)


def listing(items: Iterable[str], limit: int = 10) -> str:
    """The first `limit` items, separated by commas, and the number of the others."""
    items = list(items)
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
