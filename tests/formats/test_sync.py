"""What is written survives a power cut: macOS has a call of its own for that."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from zimage_ref.formats import files


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl")
@pytest.mark.parametrize("knows", [True, False], ids=["a disk", "a network disk"])
def test_macos_writes_out_what_the_drive_holds(knows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def control(handle: int, call: int) -> None:
        asked.append(call)
        if not knows:
            raise OSError

    monkeypatch.setattr(files, "FULL_SYNC", 51)
    monkeypatch.setattr(files.fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda handle: asked.append("fsync"))
    with files.atomic_write(tmp_path / "x") as file:
        file.write(b"1")
    assert asked == ([51] if knows else [51, "fsync"])


def test_no_file_is_synced_in_another_way() -> None:
    root = Path(files.__file__).parents[2]
    sources = [path for package in ("zimage_ref", "zimage_mlx", "cli") for path in (root / package).rglob("*.py")]
    assert [path.name for path in sources if "os.fsync" in path.read_text(encoding="utf-8")] == ["files.py"]
