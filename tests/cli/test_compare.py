"""`zimage compare`: what differs in records and pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zimage_cli.app import main
from zimage_ref import ConfigError
from zimage_ref.pictures.comparison import pixel_difference, record_changes
from zimage_ref.pictures.images import save_picture

RECORD = {
    "prompt": "a fox", "width": 40, "height": 20, "steps": 8, "guidance": 0.0, "seed": 1, "model": "m",
    "loras": [{"file": "a.safetensors", "scale": 1.0, "sha256": "00"}],
}  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a.png and b.png: b has a red spot of 4 x 2 pixels, another seed, and another strength of the LoRA."""
    monkeypatch.chdir(tmp_path)
    first = Image.new("RGB", (40, 20), (100, 100, 100))
    second = first.copy()
    second.paste((150, 100, 100), (10, 5, 14, 7))
    loras = [{**RECORD["loras"][0], "scale": 0.5}]
    save_picture(first, Path("a.png"), RECORD)
    save_picture(second, Path("b.png"), {**RECORD, "seed": 2, "loras": loras})


@pytest.mark.usefixtures("pair")
def test_records_and_pixels_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a.png", "b.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["record"] == {"seed": [1, 2], "lora a.safetensors": ["1.0 (00)", "0.5 (00)"]}
    pixels = found["pixels"]
    assert pixels["changed"] == pixels["visible"] == 8 / 800 and pixels["largest"] == 50
    assert pixels["mean"] == pytest.approx(50 * 8 / 2400) and pixels["box"] == [10, 5, 14, 7]
    assert pixels["psnr"] == pytest.approx(10 * np.log10(255**2 / (2500 * 8 / 2400)))
    assert main(["compare", "a.png", "b.png", "--output=both.png"]) == 0
    out = capsys.readouterr().out
    assert "seed" in out and "10, 5 to 14, 7" in out and "prompt" not in out
    sheet = np.asarray(Image.open("both.png"))
    assert (sheet == (255, 0, 0)).all(axis=2).sum() == 8  # the difference, made as bright as it can be
    assert main(["compare", "a.png", "b.png", "--output=both.png"]) == 1


@pytest.mark.usefixtures("pair")
def test_equal_pictures_and_strange_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a.png", "a.png"]) == 0
    out = capsys.readouterr().out
    assert "all pixels are equal" in out and "both were made with the same options" in out
    assert main(["compare", "a.png", "a.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pixels"]["psnr"] is None  # infinite
    Image.new("RGB", (30, 20)).save("c.jpg")
    assert main(["compare", "a.png", "c.jpg"]) == 0
    said = capsys.readouterr()
    assert "40 x 20 and 30 x 20 pixels: their pixels are not compared" in said.out and "c.jpg" in said.err
    assert main(["compare", "a.png", "none.png"]) == 1
    with pytest.raises(ConfigError, match="cannot be compared"):
        pixel_difference(Image.new("RGB", (1, 2)), Image.new("RGB", (2, 1)))


def test_loras_are_compared_file_by_file() -> None:
    one = {"file": "a", "scale": 1.0, "sha256": "0"}
    assert record_changes({"loras": [one, one]}, {"loras": [one]}) == {"lora a again": ("1.0 (0)", None)}
    assert record_changes({"loras": "none"}, {"loras": []}) == {"loras": ("none", None)}
