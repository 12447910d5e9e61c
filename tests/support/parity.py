"""One way to compare numbers: shape, then dtype, then values, with tolerances from one table.

The error of an element is its distance from what is expected, relative to the largest magnitude expected.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TOLERANCES = {  # (dtype of the result, what it is compared with): largest error
    ("float64", "golden"): 1e-6,  # the official code in float64, which keeps RoPE and norms in float32
    ("float32", "golden"): 1e-5,
    ("float32", "twin"): 1e-5,  # zimage_mlx with zimage_ref in float64
    ("float16", "twin"): 5e-3,
    ("bfloat16", "twin"): 3e-2,
    ("float32", "bfloat16 sampling"): 3e-2,  # latents after several steps with bfloat16 networks
    ("float64", "same"): 1e-12,  # two ways to the same number in one package
    ("float32", "same"): 1e-5,
    ("float32", "gradient"): 1e-5,  # with central differences in float64
    ("float32", "picture"): 1 / 255,  # of either package, pixels in 0..1
    ("float64", "picture"): 1 / 255,
    ("float32", "official picture"): 2 / 255,
    ("float64", "official picture"): 2 / 255,
}


def assert_parity(actual: Any, expected: Any, kind: str, dtype: str = "float32", name: str = "result") -> None:
    """Fails unless `actual` (NumPy or MLX) has the shape and values of `expected`, and the dtype named `dtype`."""
    values, target = to_float64(actual), to_float64(expected)
    assert values.shape == target.shape, f"{name}: shape {values.shape}, expected {target.shape}"
    assert dtype_name(actual) == dtype, f"{name}: dtype {dtype_name(actual)}, expected {dtype}"
    assert np.isfinite(target).all(), f"{name}: the expected values are not finite"
    error = np.abs(values - target) / np.abs(target).max()
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    tolerance = TOLERANCES[dtype, kind]
    assert error[worst] <= tolerance, (
        f"{name}: off by {error[worst]:.2e} of the largest value at {tuple(map(int, worst))}: {values[worst]:.9g}, "
        f"expected {target[worst]:.9g}; {np.mean(~(error <= tolerance)):.1%} of {error.size} elements are beyond "
        f"{tolerance:.1e}, the tolerance for {dtype} ({kind})"
    )


def dtype_name(array: Any) -> str:
    """float32, bfloat16, ... of a NumPy or MLX array."""
    return str(array.dtype).removeprefix("mlx.core.")


def to_float64(array: Any) -> np.ndarray:
    """Any array as NumPy float64; by way of a list where it is MLX's, whose bfloat16 NumPy lacks."""
    return np.asarray(array if isinstance(array, np.ndarray) else array.tolist(), np.float64)
