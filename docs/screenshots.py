"""Draws the pictures of docs/studio.md: the page of `zimage serve`, in a real Chromium, on the built-in model.

python docs/screenshots.py    (about 2 minutes; needs the extras `serve` and `browser`, and a Chromium)
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from zimage_cli.commands.demo import WORD, write_dataset

IMAGES = Path(__file__).parent / "images"
PROMPT = f"a big blue {WORD} on a yellow background"
PROMPTS = ("a big red star on a yellow background", "a small blue ring on a white background",
           "a green heart on a black background", "a purple square left of an orange circle")  # fmt: skip
QUALITY = 72  # of WebP: small files, and letters stay sharp
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1180, "height": 800}


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of a server of the built-in model."""
    command = [sys.executable, "-m", "zimage_cli", "serve", f"--folder={folder}", "--port=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = next(m for line in process.stderr if (m := re.search(r"http://[\d.]+:\d+", line)))
        yield found[0]
    finally:
        process.terminate()
        process.communicate()


def shoot(page: Any, name: str) -> None:
    """Saves what is seen as docs/images/NAME.webp."""
    page.wait_for_timeout(400)
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.save(IMAGES / f"{name}.webp", quality=QUALITY, method=6)


def draw(page: Any) -> None:
    """Makes four pictures, and shows them beside others in the making."""
    for number, prompt in enumerate(PROMPTS, 1):
        page.fill("#prompt", prompt)
        page.click("#make")
        page.locator(f"#results li:nth-child({number})").wait_for()
    page.fill("#count", "8")  # they take long enough to be seen in the making
    page.fill("#prompt", PROMPTS[0])
    page.click("#make")
    page.locator("#queue .shots img").first.wait_for()
    page.evaluate("document.getElementById('said').hidePopover(), scrollTo(0, 0)")
    shoot(page, "studio-create")
    page.locator("#queue-section").wait_for(state="hidden")


def train(page: Any, drawings: Path) -> None:
    """Trains on the eight drawings, and shows the dataset with its plan, then the run."""
    page.click("nav a[href='#train']")
    page.set_input_files("#pictures-file", sorted(drawings.iterdir()))
    page.locator("#pictures li:nth-child(8)").wait_for()
    fields = {"run-name": WORD, "trigger": WORD, "preview-prompt": PROMPT, "preview-every": "70", "save-every": "70",
              "validation": "0.2"}  # fmt: skip
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.locator("#plan dd", has_text="and 2 held out").wait_for()
    page.evaluate("scrollTo(0, 0)")
    shoot(page, "studio-train")
    page.click("#train-start")
    page.locator("#run-state", has_text=": done").wait_for(timeout=600_000)
    page.locator("#run-panel").scroll_into_view_if_needed()
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    shoot(page, "studio-run")


def merge(page: Any) -> None:
    """Asks for a LoRA made of two others."""
    page.locator("#loras").get_by_text("Convert or merge").first.click()
    page.click("#convert-add")
    page.fill("#convert-loras li:nth-child(2) input", "0.5")
    page.fill("#convert-name", "both")
    shoot(page, "studio-merge")


def main() -> None:
    """Draws all pictures."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as place, server(Path(place) / "studio") as url, sync_playwright() as player:
        drawings = Path(place) / "drawings"
        drawings.mkdir()
        write_dataset(drawings)
        browser = player.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport=DESK)
        page.set_default_timeout(120_000)
        page.goto(url)
        page.locator("main:not([inert])").wait_for()
        draw(page)
        train(page, drawings)
        phone = browser.new_page(viewport=PHONE, color_scheme="dark")
        phone.goto(f"{url}/#train")
        phone.locator("#sample-pictures img").first.wait_for()
        phone.locator("#plan dd").first.wait_for()  # the plan pushes the run down
        phone.evaluate("document.getElementById('run-panel').scrollIntoView()")
        shoot(phone, "studio-phone")
        page.click("text=Test in Create >> nth=0")
        page.fill("#prompt", PROMPT)
        page.fill("#count", "1")
        page.click("#make")
        page.locator("#results li:nth-child(13)").wait_for()
        page.click("nav a[href='#library']")
        page.evaluate("document.getElementById('said').hidePopover(), scrollTo(0, 0)")
        shoot(page, "studio-library")
        merge(page)
        browser.close()


if __name__ == "__main__":
    main()
