"""Facts about the device that MLX computes on."""

from __future__ import annotations

import sys

import mlx.core as mx

from zimage_mlx.device import on_gpu
from zimage_ref.doctor.findings import Machine, Problem, Rate

_OLDEST_ON_METAL = (0, 32, 1)
_SLOW_BFLOAT16 = 1.15  # times as many float16 products a second: the chip has no bfloat16 arithmetic
_VERSION: str = mx.__version__  # type: ignore[attr-defined]
_FACTS = (
    "device_name", "architecture", "memory_size", "total_memory", "max_recommended_working_set_size",
    "max_buffer_length", "resource_limit",
)  # fmt: skip


def describe(limit: int | None) -> Machine:
    """Name and limits of the device, and the version of MLX. limit: bytes that this program lets itself use."""
    info = mx.device_info()
    facts: dict[str, str | int | float] = {"backend": backend(), "mlx version": _VERSION}
    facts |= {name: info[name] for name in _FACTS if name in info}
    if limit:
        facts["memory limit"] = limit
    problems = []
    if sys.platform == "darwin" and not on_gpu():
        problems.append(
            Problem("MLX does not use the GPU of this Mac", "unset MLX_USE_CPU, or reinstall mlx", grave=True)
        )
    if mx.metal.is_available() and version() < _OLDEST_ON_METAL:
        fact = f"mlx {_VERSION} has known faults on Metal"
        problems.append(Problem(fact, "install a newer one with pip", grave=True))
    return Machine(facts, problems)


def backend() -> str:
    """The backend of MLX: metal, cuda or cpu."""
    if not on_gpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def version() -> tuple[int, ...]:
    """That of MLX, without what follows a letter or a plus sign."""
    numbers = []
    for part in _VERSION.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def slow_bfloat16(rates: list[Rate]) -> list[Problem]:
    """The advice if bfloat16 is slower than float16. M1 and M2 emulate bfloat16."""
    products = {rate.dtype: rate.per_second for rate in rates if rate.name == "product"}
    if not on_gpu() or products.get("f16", 0) < _SLOW_BFLOAT16 * products.get("bf16", 1e30):
        return []
    fact = f"float16 is {products['f16'] / products['bf16']:.1f} times as fast as bfloat16 on this chip"
    return [Problem(fact, "try `dtype` float16: pictures differ a little")]
