"""A fast BLAS before MLX: which library is taken, where none is, and that MLX really computes with it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from zimage_cli.terminal import blas


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    blas.preload.cache_clear()
    yield
    blas.preload.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The libraries of a machine with MLX's own CPU package."""
    there: set[str] = set()

    def load(name: str, mode: int) -> None:
        assert mode == ctypes.RTLD_GLOBAL  # else MLX would not see it
        if name not in there:
            raise OSError(name)

    monkeypatch.setattr(blas.ctypes, "CDLL", load)
    monkeypatch.setattr(blas, "version", lambda package: "1")
    return there


def test_the_first_library_of_the_list_that_is_there_is_loaded(machine: set[str]) -> None:
    machine |= {blas.LIBRARIES[2], blas.LIBRARIES[1]}
    assert blas.preload() == blas.LIBRARIES[1] and blas.advice() is None


def test_where_there_is_none_one_line_says_how_to_get_one(machine: set[str]) -> None:
    assert blas.preload() is None
    assert "apt install" in blas.advice() and "\n" not in blas.advice()


def test_where_mlx_does_not_use_the_reference_blas_nothing_is_loaded(
    machine: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(package: str) -> Any:
        raise blas.PackageNotFoundError(package)

    machine |= set(blas.LIBRARIES)
    monkeypatch.setattr(blas, "version", absent)  # a Mac, a GPU, or no MLX
    assert blas.preload() is None and blas.advice() is None


@pytest.mark.slow
def test_mlx_multiplies_matrices_faster_after_it() -> None:
    if blas.preload() is None:
        pytest.skip("this machine has no fast BLAS for MLX, or MLX needs none")
    program = """
import sys, time
if sys.argv[1] == "fast":
    from zimage_cli.terminal.backends import require_mlx
    require_mlx("this test")
import mlx.core as mx
a = mx.ones((512, 512)); mx.eval(a @ a)
start = time.perf_counter(); mx.eval(a @ a); print(time.perf_counter() - start)
"""

    def seconds(how: str) -> float:
        # a library that the machine preloads would make both fast
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        argv = [sys.executable, "-c", program, how]
        return float(subprocess.run(argv, capture_output=True, text=True, check=True, env=environment).stdout)

    assert min(seconds("fast") for _ in range(3)) < min(seconds("slow") for _ in range(3)) / 3
