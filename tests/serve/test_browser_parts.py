"""Parts of the page in a real Chromium: pictures to follow, LoRAs and checkpoints made of others, masks to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.browser import fill_in, go, make, open_tab
from support.errands import Errands
from support.networks import mlx_only
from support.serving import Served

from zimage_cli.commands.demo import write_dataset

pytestmark = [pytest.mark.slow, mlx_only]


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


def test_a_lora_and_a_checkpoint_are_made_of_others(browser: Any, served: Served, tmp_path: Path) -> None:
    folder = served.studio.loras.folder
    Errands(tmp_path).lora(folder / "fox.safetensors")
    Errands(tmp_path).lora(folder / "owl.safetensors", rank=3)
    tab = open_tab(browser, served.url)
    page = tab.page
    go(tab, "library")
    tab.see("#checkpoint-files h4", "The transformer of this server")
    page.click("#loras li:has-text('fox') >> text=Convert or merge")
    page.select_option("#convert-lora", "owl.safetensors")
    page.click("#convert-add")
    page.fill("#convert-loras li:nth-child(2) input", "0.5")
    fill_in(page, convert_name="both", convert_rank=4)
    page.click("#convert .primary")
    tab.see("#said", "both.safetensors is there.")
    card = tab.see("#loras li", "both.safetensors")
    assert card.locator("dt:text-is('Rank') + dd").text_content() == "4"
    page.click("#checkpoint-files li:first-child >> text=Convert or merge")
    fill_in(page, convert_name="both")
    page.select_option("#convert-lora", "both.safetensors")
    page.click("#convert-add")
    page.select_option("#convert-quantize", "8")
    page.select_option("#convert-group_size", "32")
    page.click("#convert .primary")
    tab.see("#checkpoint-files h4", "both.safetensors")
    assert len(served.client.get("/api/checkpoints").json()) == 2
    page.click("#checkpoint-files li:nth-child(2) >> text=Details")
    tab.see("#inspect-table td", "layers.0.attention.to_q.weight")
    page.keyboard.press("Escape")
    page.click("#checkpoint-files li:nth-child(2) button:has-text('Rename')")
    page.fill("#checkpoint-files li:nth-child(2) form input", "small")
    page.keyboard.press("Enter")
    tab.see("#checkpoint-files h4", "small.safetensors")
    for _ in range(2):
        page.click("#checkpoint-files li:nth-child(2) .danger")
    page.locator("#checkpoint-files li:nth-child(2)").wait_for(state="detached")
    tab.clean()
    page.click("#loras li:has-text('fox') >> text=Convert or merge")
    fill_in(page, convert_name="owl")
    page.click("#convert .primary")
    tab.see("#convert-problem", "a LoRA with this name exists")


def test_a_mask_to_train_is_painted_and_a_kind_is_chosen(browser: Any, served: Served, tmp_path: Path) -> None:
    tab = open_tab(browser, served.url)
    page = tab.page
    go(tab, "train")
    (tmp_path / "drawings").mkdir()
    files = sorted(write_dataset(tmp_path / "drawings").iterdir())
    Image.new("L", (128, 128), 255).save(tmp_path / "zorp2.mask.png")
    tab.drop("#pictures-drop", [tmp_path / "zorp2.mask.png", *files])
    tab.see("#dataset-facts", "8 pictures")
    tab.see("#pictures li[data-name='zorp2.png'] .shown", "with a mask")
    assert page.locator("#train-mask").input_value() == "file"
    page.select_option("#train-mask", "none")
    page.click("#pictures li[data-name='zorp1.png'] >> text=Paint a mask")
    tab.see("#paint-help", "White parts are learned.")
    box = tab.see("#paint").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.click("#paint-done")
    tab.see("#pictures li[data-name='zorp1.png'] .shown", "with a mask")
    assert page.locator("#train-mask").input_value() == "file"
    fill_in(page, run_name="fox", trigger="zorp", train_steps=2)
    page.select_option("#kind", "lokr")
    tab.see("#plan-warnings li", "pictures without a mask are learned whole")
    page.click("#pictures li[data-name='zorp2.png'] .mask-remove")
    page.locator("#pictures li[data-name='zorp2.png'] .mask-remove").wait_for(state="hidden")
    page.click("#train-start")
    tab.see("#run-state", "fox: done, step 2 of 2", 300)
    options = served.client.get("/api/runs").json()[0]["options"]
    assert (options["kind"], options["mask"], options["regularization"]) == ("lokr", "file", None)
    tab.clean()
