"""The built-in model's picture against the one that NumPy made of the same prompt; and the same bytes twice."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from zimage_mlx.networks.fused_attention import without_fused_gradient
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.checkpoints.hub import TINY
from zimage_ref.doctor.findings import Verdict
from zimage_ref.doctor.prediction import NAMES
from zimage_ref.formats.tensors import Array
from zimage_ref.pictures.images import read_picture

from .cases import Size
from .checking import text
from .layers import gradient
from .limits import EPS, Errors, as_float32

STORED = Path(__file__).parent / "picture.png"  # made by `draw` with the pipeline of zimage_ref, in float32
PROMPT, SIDE, SEED = "a big red star on a blue background", 128, 7
_GRAY = 128.0
# A value of the stored picture is rounded to 1/255. A prediction is rounded about as a block is, 40 times in a row;
# guidance of 3 takes one prediction four times; what eight steps add to the error is no more than that of one
_STORED_ROUNDING = 4e-3
_ROUNDINGS = 4 * 40**0.5
_FUSED = "MLX's fused gradient of attention differs in the last bits from run to run"
_TO_ROUNDING = "a resumed run equals one that was not stopped to rounding"
_UNEQUAL = "results differ from run to run: a resumed run may differ from one that was not stopped; report it"


def draw(pipe: ZImagePipeline) -> Array:
    """The picture (H, W, 3), 0 to 255, less gray."""
    (image,) = pipe(PROMPT, width=SIDE, height=SIDE, steps=8, guidance=3.0, seed=SEED)
    return np.asarray(image, np.float32) - _GRAY


def built_in(dtype: str) -> Verdict:
    """The device's picture in `dtype` against the stored one."""
    start = time.perf_counter()
    expected = np.asarray(read_picture(STORED), np.float32) - _GRAY
    errors = Errors.of(draw(ZImagePipeline.from_pretrained(TINY, NAMES[dtype])), expected)
    limit = _STORED_ROUNDING + 0.2123 * EPS[dtype] * _ROUNDINGS
    return Verdict(
        "picture of the built-in model", dtype, f"{SIDE} x {SIDE}", errors.error, limit, errors.worst, 10 * limit,
        time.perf_counter() - start,
    )  # fmt: skip


def repeated(size: Size, dtype: str) -> Verdict:
    """A block's gradient computed twice: which part of the values differs. None may, or a resumed run would differ.

    cuDNN's fused gradient of attention differs in the last bits. If nothing differs without it, a note tells its part.
    """
    start, remark = time.perf_counter(), ""
    part = _different(size, dtype)
    if part:
        with without_fused_gradient():
            rest = _different(size, dtype)
        part, remark = (part, "") if rest else (0.0, f"{_FUSED} ({part:.0%} of the values): {_TO_ROUNDING}")
    mx.clear_cache()
    return Verdict(
        "the same bytes twice", dtype, text(size), part, 0.0, part, 0.0, time.perf_counter() - start,
        remedy=_UNEQUAL, remark=remark,
    )  # fmt: skip


def _different(size: Size, dtype: str) -> float:
    """The part of the values that differ if a block's gradient is computed twice."""
    trial = gradient(size)
    first, second = ([as_float32(array) for array in trial.actual(dtype)] for _ in range(2))
    different = sum(int(np.count_nonzero(a != b)) for a, b in zip(first, second, strict=True))
    return different / sum(a.size for a in first)
