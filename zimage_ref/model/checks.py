"""Checks of arrays that come from outside: shape, dtype and finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array


def check_maps(what: str, shape: Sequence[int], channels: int, multiple: int, batch: int | None = None) -> None:
    """Raises ConfigError unless `shape` is (batch, channels, H, W), and H and W are multiples of `multiple`.

    batch: None means any number. what: names the array in the message.
    """
    good = len(shape) == 4 and shape[1] == channels and batch in (None, shape[0]) and shape[0] > 0
    if not good or any(side < multiple or side % multiple for side in shape[2:]):
        sides = f"multiples of {multiple}" if multiple > 1 else "at least 1"
        raise ConfigError(
            f"{what} have shape {tuple(shape)}: they must be ({batch or 'B'}, {channels}, H, W), H and W {sides}"
        )


def checked_numbers(what: str, values: object) -> Array:
    """`values` as a NumPy array of float32. Raises ConfigError unless all are finite real numbers."""
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"they are {array.dtype}")
        numbers: Array = array.astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} are not an array of real numbers: {error}") from error
    check_finite(what, numbers)
    return numbers


def check_finite(what: str, numbers: Array) -> None:
    """Raises ConfigError unless all `numbers` are finite."""
    if not np.isfinite(numbers).all():
        raise ConfigError(
            f"{what} hold numbers that are not finite: `guidance` or a LoRA's scale is too high, `dtype` is too "
            f"narrow, or the weights are damaged"
        )
