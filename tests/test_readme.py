"""README's Python runs as it is written, with the public names of zimage_mlx alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.networks import HAS_MLX, mlx_only

if HAS_MLX:
    import mlx.core as mx

    import zimage_mlx

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# The examples are of the real model: here pictures are smaller and runs shorter
SMALLER = {"1024": "32", "seed=7)": "seed=7, width=32, height=32)", "rank=16)": "rank=16, steps=1, resolution=32)"}


def test_it_imports_from_zimage_mlx_alone() -> None:
    modules = {n.module for block in BLOCKS for n in ast.walk(ast.parse(block)) if isinstance(n, ast.ImportFrom)}
    assert modules == {"zimage_mlx"}


@mlx_only
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.write_model_folder(tmp_path / "Z-Image-Turbo")
    pixels = np.random.RandomState(0).randint(0, 255, (40, 40, 3), np.uint8)
    (tmp_path / "dataset").mkdir()
    for path in ("dataset/a.png", "photo.jpg"):
        Image.fromarray(pixels).save(path)
    Path("dataset/a.txt").write_text("a fox", encoding="utf-8")
    names: dict[str, object] = {  # what the text around the examples speaks of
        "pipe": zimage_mlx.ZImagePipeline.from_pretrained(model),
        "model_dir": model, "dataset": tmp_path / "dataset", "output": tmp_path / "fox.safetensors",
        "pixels": mx.zeros((1, 3, 32, 32)), "x": mx.zeros((1, 16, 4, 4)), "t": mx.array([0.5]),
    }  # fmt: skip
    training_first = sorted(BLOCKS, key=lambda block: "train(" not in block)  # it makes the LoRA that others use
    for block in training_first:
        for real, small in SMALLER.items():
            block = block.replace(real, small)
        exec(compile(block, "README.md", "exec"), names)
    assert "Done(" in capsys.readouterr().out
    assert {"0.png", "1.png", "2.png", "3.png"} <= {path.name for path in tmp_path.glob("*.png")}
