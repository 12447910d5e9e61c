"""Parts of the page in a real Chromium: pictures to follow, LoRAs and checkpoints made of others, masks to train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import chromium, make, open_tab
from support.errands import Errands
from support.networks import mlx_only
from support.serving import Served, serving

pytestmark = [pytest.mark.slow, mlx_only]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "studio") as running:
        yield running


def test_a_picture_is_followed(browser: Any, served: Served, tmp_path: Path) -> None:
    errands = Errands(tmp_path)
    tab = open_tab(browser, served.url)
    tab.see("#control-none")
    errands.control(served.studio.controls.folder / "net.safetensors")
    errands.photo(tmp_path / "a.png")
    tab.page.reload()
    tab.see("#control-drop")
    tab.drop("#control-drop", [tmp_path / "a.png"])
    tab.see("#control-picture")
    tab.page.select_option("#control-kind", "gray")
    tab.page.locator("#control-scale").fill("0.5")
    tab.page.fill("#control-end", "0.8")
    tab.page.reload()
    tab.see("#control-picture")
    assert tab.page.locator("#control-scale-shown").text_content() == "0.5"
    make(tab, "a red star", 1)
    asked = served.client.get("/api/jobs").json()[0]["asked"]
    wanted = {"control": "net.safetensors", "control_scale": 0.5, "control_kind": "gray", "control_end": 0.8}
    assert {name: asked[name] for name in wanted} == wanted and asked["control_image"]
    tab.page.click("#control-clear")
    make(tab, "a red star", 2)
    assert not [name for name in served.client.get("/api/jobs").json()[0]["asked"] if name.startswith("control")]
    tab.page.click("#results li:nth-child(2) .tile")
    assert tab.page.locator("#viewer-facts dt:text-is('ControlNet') + dd").text_content() == "net.safetensors:0.5"
    tab.page.click("#viewer-use")
    tab.see("#control-picture")
    assert tab.page.locator("#control-kind").input_value() == "gray"
    tab.clean()
