"""The page in a real Chromium: the whole way from drawings to a picture of a new word, and what may go wrong."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.browser import Tab, fill_in, go, make, open_tab
from support.networks import mlx_only
from support.serving import Served, serving

from zimage_cli.commands.demo import WORD, write_dataset

pytestmark = [pytest.mark.slow, mlx_only]
PROMPT = "a big blue zorp on a yellow background"
PATIENCE = 180  # seconds for the start of a server, on a machine that others use
STEP = re.compile(r"Step \d+:")
EVIL = '<img src=x onerror="document.title=1"><script>document.title=1</script>'


def lesson(folder: Path) -> list[Path]:
    """The files of eight drawings of a new word, with captions."""
    folder.mkdir()
    return sorted(write_dataset(folder).iterdir())


def drop_lesson(tab: Tab, folder: Path) -> None:
    go(tab, "train")
    tab.drop("#pictures-drop", lesson(folder))
    tab.see("#pictures li:nth-child(8)")
    tab.see("#dataset-facts", "8 pictures")


def test_the_whole_way_from_drawings_to_a_picture_of_the_word(browser: Any, served: Served, tmp_path: Path) -> None:
    tab = open_tab(browser, served.url)
    page = tab.page
    make(tab, PROMPT, 1)
    drop_lesson(tab, tmp_path / "drawings")
    fill_in(page, find=WORD, put="[trigger]")
    page.click("#replace button:not([type=button])")
    tab.see("#said", "8 captions changed.")
    assert (
        page.locator("#pictures textarea").first.input_value() == "a red [trigger] in the middle on a white background"
    )
    fill_in(page, run_name="fox", trigger=WORD, train_steps=24, preview_prompt=PROMPT, preview_every=12, save_every=12)
    keep_prompts(page)
    tab.drop("#pictures-drop", [tmp_path / "drawings" / "zorp1.png"])
    tab.see("#plan-warnings li", "equal pictures: zorp1-2.png, zorp1.png")
    tab.see("#pictures li[data-name='zorp1-2.png'] .shown", "trained at 128 x 128")
    for _ in range(2):
        page.click("#pictures li[data-name='zorp1-2.png'] .danger")
    tab.see("#dataset-facts", "8 pictures")
    tab.see("#plan dd", "24, 8 for each time through the pictures")
    page.click("#train-start")
    tab.see("#chart-text", STEP)
    page.reload()  # in the middle of the run
    tab.see("#view-train")
    assert page.locator("#run-name").input_value() == "fox"
    tab.see("#run-state", "fox: running")
    tab.see("#run-state", "fox: done, step 24 of 24", 300)
    assert served.client.get("/api/runs").json()[0]["options"]["preserve_prompt"] == ["a red star, small", "a ring"]
    check_fall(tab)
    assert page.locator("#chart polyline").first.get_attribute("points").count(",") == 24
    tab.see("#sample-shown", "step 24")
    page.locator("#sample").press("ArrowLeft")
    tab.see("#sample-shown", "step 12")
    page.click("text=Test in Create >> nth=0")
    assert page.locator("#prompt").input_value() == f"{PROMPT}"  # it holds the trigger already
    page.fill("#prompt", "a big blue on yellow")
    page.click(f'button:has-text("Insert \\"{WORD}\\"")')
    assert page.locator("#prompt").input_value().endswith(WORD)
    make(tab, PROMPT, 2)
    compare_and_use(tab)
    made = served.client.get("/api/pictures").json()[0]
    assert made["prompt"] == PROMPT and made["record"]["loras"]
    job = served.client.get(f"/api/jobs/{made['job']}").json()
    assert job["asked"]["loras"] == [{"name": "fox.safetensors", "scale": 1}]
    tab.clean()


def check_fall(tab: Tab) -> None:
    """The text of the chart names a loss that is lower than at first."""
    text = tab.see("#chart-text", "Step 24:").text_content()
    last, first = (float(part.split()[0].rstrip(".,")) for part in text.split("loss ")[1].split("at first "))
    assert last < first


def keep_prompts(page: Any) -> None:
    """Gives prompts to preserve, one with a comma, in a field that has a line for each."""
    page.click("summary:has(+ #train-more)")
    page.fill("#train-preserve_prompt", "a red star, small\n\n a ring ")
    page.fill("#train-preserve_every", "12")


def compare_and_use(tab: Tab) -> None:
    """Compares the two pictures of the grid, and takes the settings of the older one, which has no LoRA."""
    page = tab.page
    for i in (1, 2):
        page.check(f"#results li:nth-child({i}) input")
    page.click("#view-create .compare-open")
    page.locator("#cut").press("Home")
    cut = page.locator("#compare-a").evaluate("(picture) => getComputedStyle(picture).clipPath")
    assert cut.startswith(("inset(0px 100%", "inset(0px calc(100%"))
    page.keyboard.press("Escape")
    page.click("#results li:nth-child(2) .tile")
    seed = page.locator("#viewer-facts dt:text-is('Seed') + dd").text_content()
    page.click("#viewer-use")
    tab.see("#said", "The form holds the settings of that picture.")
    assert page.locator("#seed").input_value() == seed and page.locator("#lock").is_checked()
    page.locator("#picked li").wait_for(state="detached")


def test_two_tabs_see_one_queue(browser: Any, served: Served) -> None:
    context = browser.new_context()
    one, two = (open_tab(browser, served.url, context) for _ in range(2))
    fill_in(one.page, prompt="a red star", count=4)
    one.page.click("#make")
    two.see("#queue .prompt", "a red star")
    two.see("#queue .shots img")
    two.see("#results li:nth-child(4)")
    one.see("#results li:nth-child(4)")
    fill_in(two.page, prompt="a blue ring", count=8)
    two.page.click("#make")
    one.see("#queue .prompt", "a blue ring")
    one.page.click("#queue button:has-text('Cancel')")
    two.page.locator("#queue-section").wait_for(state="hidden")
    assert served.client.get("/api/jobs").json()[0]["state"] == "cancelled"
    names = {tab.page.evaluate("sessionStorage.getItem('client')") for tab in (one, two)}
    assert len(names) == 2
    one.clean()
    two.clean()


def test_a_mask_is_painted_by_pointer_and_by_keyboard(browser: Any, served: Served, tmp_path: Path) -> None:
    Image.new("RGB", (128, 128), "yellow").save(tmp_path / "start.png")
    tab = open_tab(browser, served.url)
    tab.drop("#init-drop", [tmp_path / "start.png"])
    tab.page.click("#mask-open")
    box = tab.see("#paint").bounding_box()
    tab.page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    tab.page.mouse.down()
    tab.page.mouse.up()
    for key in ("ArrowRight", "ArrowRight", "Space"):
        tab.page.locator("#paint").press(key)
    tab.page.click("#paint-done")
    tab.see("#mask-picture")
    make(tab, "a red star", 1)
    asked = served.client.get("/api/jobs").json()[0]["asked"]
    mask = Image.open(io.BytesIO(served.client.get(f"/api/uploads/{asked['mask']}").content)).convert("L")
    white = [mask.getpixel(at) for at in ((32, 32), (64, 64), (79, 64), (110, 110), (32, 96))]
    assert white[0] == 255 and white[2] == 255 and white[3] == 0 and white[4] == 0
    assert asked["strength"] == 0.6
    tab.page.reload()
    tab.see("#mask-picture")
    tab.clean()


def test_texts_of_others_stay_texts(browser: Any, served: Served, tmp_path: Path) -> None:
    served.make(prompt=EVIL)
    tab = open_tab(browser, served.url)
    tab.page.click("#results .tile")
    assert tab.see("#viewer-prompt").text_content() == EVIL
    tab.page.keyboard.press("Escape")
    drop_lesson(tab, tmp_path / "drawings")
    served.client.patch("/api/datasets/pictures/captions", json={"zorp1.png": EVIL})
    go(tab, "create")
    go(tab, "train")
    tab.page.wait_for_timeout(500)
    assert tab.page.locator("#pictures textarea").first.input_value() == EVIL
    fill_in(tab.page, run_name="../x")
    tab.see("#plan-problem", "a name is 1 to 100 letters")
    assert tab.page.title() == "Train - zimage" and tab.page.locator("img[src=x]").count() == 0
    assert [
        text for text in tab.problems if "400" not in text
    ] == [] and tab.foreign == []  # the browser notes refusals


def test_the_key_is_asked_for_once(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path / "studio", api_key="secret") as served:
        tab = open_tab(browser, served.url)
        fill_in(tab.page, key="wrong")
        tab.page.press("#key", "Enter")
        tab.see("#login-problem", "This is not the API key.")
        fill_in(tab.page, key="secret")
        tab.page.press("#key", "Enter")
        make(tab, "a red star", 1)
        tab.page.reload()
        tab.see("#results li")
        assert not tab.page.locator("#login").is_visible()


def test_everything_is_reached_by_keys(browser: Any, served: Served) -> None:
    tab = open_tab(browser, served.url)
    tab.see("#create-form")
    focused = []
    for _ in range(8):
        tab.page.keyboard.press("Tab")
        focused.append(tab.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert focused == ["Skip to the view", "Create", "Train", "Library", "prompt", "negative", "size", "width"]
    fill_in(tab.page, prompt="a red star")
    tab.page.press("#seed", "Enter")
    tab.see("#results li")
    tab.page.focus("#results .tile")
    tab.page.keyboard.press("Enter")
    tab.see("#viewer")
    tab.page.keyboard.press("Escape")
    assert tab.page.evaluate("document.activeElement.className") == "tile"
    tab.clean()


def server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zimage_cli", "serve", f"--folder={folder}", f"--port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
            return process
        except httpx.TransportError:
            time.sleep(0.1)
    process.kill()
    process.wait()
    raise AssertionError("the server did not start")


def test_a_killed_server_comes_back_with_everything(browser: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = server(tmp_path / "studio", port)
    try:
        tab = open_tab(browser, f"http://127.0.0.1:{port}")
        make(tab, "a red star", 1)
        drop_lesson(tab, tmp_path / "drawings")
        fill_in(tab.page, run_name="fox", train_steps=40)
        tab.see("#plan dd", "40, 8")
        tab.page.click("#train-start")
        tab.see("#chart-text", STEP)
        process.send_signal(signal.SIGKILL)
        process.wait()
        tab.see("#offline", "The server does not answer.")
        process = server(tmp_path / "studio", port)
        tab.page.locator("#offline").wait_for(state="hidden")
        tab.see("#run-state", "fox: stopped")
        tab.page.click("#run-resume")
        tab.see("#run-state", "fox: done, step 40 of 40", 300)
        go(tab, "create")
        tab.see("#results li")
        assert tab.foreign == []
    finally:
        process.kill()
        process.wait()
