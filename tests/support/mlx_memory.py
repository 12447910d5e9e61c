"""MLX's count of its memory, for tests that compare peaks."""

from __future__ import annotations

import gc

import mlx.core as mx


def measured_from() -> int:
    """Bytes in use now; the peak counts from here. What other tests left is freed first, not while a test measures."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()
