"""The Python in the pages runs, top to bottom, on the built-in model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.errands import Errands
from support.networks import mlx_only
from support.pages import ROOT, blocks

from zimage_ref.checkpoints.hub import BUILT_IN

PAGE = ROOT / "docs" / "python.md"
SMALLER = {
    "1024": "32",
    "512": "32",
    "steps=2000": "steps=2",
    "Tongyi-MAI/Z-Image-Turbo": "turbo",
    "Tongyi-MAI/Z-Image": "turbo",
}


@mlx_only
@pytest.mark.slow
def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BUILT_IN, tmp_path / "turbo")  # with Turbo's schedule: 8 steps, no guidance
    file = tmp_path / "turbo" / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text(encoding="utf-8")) | {"shift": 3.0, "use_dynamic_shifting": False}
    file.write_text(json.dumps(scheduler), encoding="utf-8")
    errands = Errands(tmp_path)
    errands.lora(tmp_path / "fox.safetensors")
    errands.dataset(tmp_path / "dog")
    errands.photo(tmp_path / "photo.jpg")
    errands.control(tmp_path / "union-2.1.safetensors")
    names: dict[str, object] = {}
    for block in blocks(PAGE, "python"):
        code = block.text
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        exec(compile(code, f"{PAGE.name}, line {block.line}", "exec"), names)
    made = {path.name for path in tmp_path.iterdir()}
    assert {"fox.png", "0.png", "3.png", "8.png", "dog.safetensors"} <= made
    assert capsys.readouterr().out.endswith("dog.safetensors\n")
