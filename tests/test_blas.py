"""A fast BLAS before MLX: which library is taken, where none is, and that MLX really computes with it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zimage_mlx import blas


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    blas.preload.cache_clear()
    yield
    blas.preload.cache_clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The libraries of a Linux machine with MLX's own CPU package."""
    there: set[str] = set()
    monkeypatch.setattr(blas.sys, "platform", "linux")
    monkeypatch.setattr(blas.sys, "path", [str(tmp_path / "absent"), str(tmp_path)])
    (tmp_path / blas.REFERENCE).mkdir()

    def load(name: str, mode: int) -> None:
        assert mode == ctypes.RTLD_GLOBAL  # else MLX would not see it
        if name not in there:
            raise OSError(name)

    monkeypatch.setattr(blas.ctypes, "CDLL", load)
    return there


def test_the_first_library_of_the_list_that_is_there_is_loaded(machine: set[str]) -> None:
    machine |= {blas.LIBRARIES[2], blas.LIBRARIES[1]}
    assert blas.preload() == blas.LIBRARIES[1] and blas.advice() is None


def test_where_there_is_none_one_line_says_how_to_get_one(machine: set[str]) -> None:
    assert blas.preload() is None
    assert "apt install" in blas.advice() and "\n" not in blas.advice()


@pytest.mark.parametrize(
    "name", ["opencv_python_headless.libs/libopenblasp-r0.so", "cmeel.prefix/lib/libopenblas.so.0"]
)
def test_a_package_of_python_may_contain_one(name: str, machine: set[str], tmp_path: Path) -> None:
    library = tmp_path / name
    library.parent.mkdir(parents=True)
    library.touch()
    assert blas.preload() is None  # it does not load
    blas.preload.cache_clear()
    machine.add(str(library))
    assert blas.preload() == str(library) and blas.advice() is None
    blas.preload.cache_clear()
    machine.add(blas.LIBRARIES[0])  # that of the system is made for this processor
    assert blas.preload() == blas.LIBRARIES[0]


@pytest.mark.parametrize("has", ["a Mac", "another MLX"])
def test_no_library_is_loaded_if_mlx_does_not_use_the_reference_blas(
    has: str, machine: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine |= set(blas.LIBRARIES)
    if has == "a Mac":
        monkeypatch.setattr(blas.sys, "platform", "darwin")
    else:
        (tmp_path / blas.REFERENCE).rmdir()
    assert blas.preload() is None and blas.advice() is None


@pytest.mark.slow
def test_mlx_multiplies_matrices_faster_after_it() -> None:
    if blas.preload() is None:
        pytest.skip("this machine has no fast BLAS for MLX, or MLX needs none")
    program = """
import sys, time
if sys.argv[1] == "fast":
    import zimage_mlx
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
