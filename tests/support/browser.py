"""The page in a real browser: it must make no error, and ask nobody but its server."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
_PREVIEW = re.compile(r"/api/jobs/[^/]+/preview\?")
_DROP = """(zone, files) => {
  const data = new DataTransfer();
  for (const [name, type, text] of files) {
    data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, { type }));
  }
  zone.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """The Chromium of the system. Skips the test, with the reason, where there is none or Playwright is missing."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e '.[browser]'")
    with api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """A tab of the browser, and what went wrong in it."""

    page: Any
    problems: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def drop(self, zone: str, files: Iterable[Path]) -> None:
        """Drops `files` on the element `zone`."""
        kinds = {".png": "image/png", ".txt": "text/plain"}
        sent = [[f.name, kinds.get(f.suffix, ""), base64.b64encode(f.read_bytes()).decode()] for f in files]
        self.page.locator(zone).evaluate(_DROP, sent)

    def see(self, selector: str, text: str | re.Pattern[str] = "", seconds: float = 150) -> Any:
        """Waits for a visible element that holds `text`."""
        found = self.page.locator(selector, has_text=text).first
        found.wait_for(timeout=1000 * seconds)
        return found

    def clean(self) -> None:
        """Nothing went wrong in the tab."""
        assert self.problems == [] and self.foreign == []


def _is_problem(message: Any) -> bool:
    """Whether the page did wrong. A preview is gone (404) if its job ends before the browser asks for it: no fault."""
    late = "404" in message.text and _PREVIEW.search(message.location["url"])
    return message.type in ("error", "warning") and not late


def open_tab(browser: Any, url: str, context: Any = None, **options: Any) -> Tab:
    """A new tab with the page at `url`. context: tabs of one context share cookies."""
    options = {"viewport": {"width": 1280, "height": 900}, **options}
    page = (context or browser.new_context(**options)).new_page()
    tab = Tab(page)
    page.on("console", lambda m: tab.problems.append(f"{m.location['url']}: {m.text}") if _is_problem(m) else None)
    page.on("pageerror", lambda error: tab.problems.append(str(error)))
    own = urlsplit(url).netloc
    page.on("request", lambda r: tab.foreign.append(r.url) if r.url.startswith("http") and urlsplit(r.url).netloc != own
            else None)  # fmt: skip
    page.set_default_timeout(150_000)
    page.goto(url)
    tab.see("main:not([inert]), #login[open]")  # the page hears nothing before
    return tab


def fill_in(page: Any, **fields: object) -> None:
    """Writes into inputs, by their ids with _ for -."""
    for name, value in fields.items():
        page.fill(f"#{name.replace('_', '-')}", str(value))


def go(tab: Tab, view: str) -> None:
    """Opens a view."""
    tab.page.click(f"nav a[href='#{view}']")
    tab.see(f"#view-{view}")


def make(tab: Tab, prompt: str, pictures: int) -> None:
    """Makes a picture, and waits until the grid holds so many."""
    fill_in(tab.page, prompt=prompt)
    tab.page.click("#make")
    tab.see(f"#results li:nth-child({pictures})")
