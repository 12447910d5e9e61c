"""What a command imports: only what it needs, so that it answers at once; and what is said if MLX does not load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import Tensor

HEAVY = ("PIL", "mlx.core", "numpy", "tokenizers", "zimage_ref.training")
PROGRAM = f"""
import sys
from zimage_cli.app import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def imported(*argv: object, cwd: Path) -> set[str]:
    """Which of `HEAVY` a command imports."""
    words = [sys.executable, "-c", PROGRAM, *map(str, argv)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("argv", [("--help",), ("--version",)])
def test_help_and_version_import_no_library(argv: tuple[str, ...], tmp_path: Path) -> None:
    assert imported(*argv, cwd=tmp_path) == set()


def test_a_file_is_inspected_without_what_other_commands_need(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a.safetensors", {"x": Tensor.of(np.ones(3, np.float32))})
    assert imported("inspect", "--input", "a.safetensors", cwd=tmp_path) == {"numpy"}


def test_numpy_draws_without_mlx(tmp_path: Path) -> None:
    argv = ("generate", "--model-dir=tiny", "--prompt=x", "--width=32", "--height=32", "--steps=1", "--backend=numpy")
    assert "mlx.core" not in imported(*argv, cwd=tmp_path)
    assert (tmp_path / "output.png").is_file()


def test_an_mlx_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    """As on a machine that has the package but not the library of its GPU."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    program = "import sys; from zimage_cli.app import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", program, "generate", "--model-dir=tiny", "--prompt=x"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.replace("\n", " ").strip() == (
        "error: --backend mlx needs MLX, which is installed but does not load: "
        "libcuda.so.1: cannot open shared object file"
    )
