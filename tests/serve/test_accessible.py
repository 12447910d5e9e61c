"""Each view and dialog of the page by axe-core: light, dark and as wide as a phone, without a serious violation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Tab, chromium, fill_in, go, make, open_tab
from support.errands import Errands
from support.networks import mlx_only
from support.serving import Served, serving

from zimage_cli.commands.demo import write_dataset

pytestmark = [pytest.mark.slow, mlx_only]
LOOKS = {
    "light": {"color_scheme": "light"}, "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}}, "dark phone": {
        "viewport": {"width": 390, "height": 844}, "color_scheme": "dark",
    },
}  # fmt: skip
SERIOUS = ("serious", "critical")
_RUN = """async () => {
  const found = await axe.run(document, { resultTypes: ["violations"] });
  return { passed: found.passes.length, violations: found.violations.map((each) => [
    each.impact, each.id, each.nodes.map((node) => node.target.join(" ")).join("; ")]) };
}"""
_SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def axe() -> str:
    package = pytest.importorskip("axe_playwright_python", reason="axe-core is missing: pip install -e '.[browser]'")
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with something of everything: pictures, LoRAs, a ControlNet, a dataset with a warning, a run."""
    home = tmp_path_factory.mktemp("home")
    with serving(home / "studio") as running:
        errands, client = Errands(home), running.client
        for name in ("fox", "owl"):
            errands.lora(running.studio.loras.folder / f"{name}.safetensors")
        (running.studio.loras.folder / "broken.safetensors").write_bytes(b"no LoRA")
        errands.control(running.studio.controls.folder / "net.safetensors")
        (home / "drawings").mkdir()
        client.put("/api/datasets/zorps")
        for path in sorted(write_dataset(home / "drawings").glob("*.png")):
            file = {"file": (path.name, path.read_bytes())}
            client.post("/api/datasets/zorps/pictures", files=file, data={"caption": "a zorp"})
        client.post("/api/datasets/zorps/pictures", files=file)
        asked = {"name": "zorp", "dataset": "zorps", "trigger": "zorp", "resolution": [32], "steps": 4, "rank": 2}
        asked |= {"validation": "0.2", "validation_every": 2, "save_every": 2}
        asked |= {"preview_prompt": ["a zorp"], "preview_every": 2, "preview_size": 32, "preview_steps": 1}
        run = client.post("/api/runs", json=asked).json()["id"]
        client.get(f"/api/runs/{run}/events")
        running.make(count=3, loras=["fox"])
        yield running


class Judge:
    """Asks axe-core about what a tab shows, and remembers what it finds."""

    def __init__(self, tab: Tab, axe: str) -> None:
        self._tab, self.found = tab, list[tuple[str, ...]]()
        tab.page.evaluate(axe)  # not a script of the page, so its content policy does not forbid it

    def look(self, place: str) -> None:
        self._tab.page.wait_for_timeout(300)
        seen = self._tab.page.evaluate(_RUN)
        assert seen["passed"] > 10, place
        self.found += [(place, *each) for each in seen["violations"] if each[0] in SERIOUS]
        if self._tab.page.evaluate(_SIDEWAYS) > 0:
            self.found.append((place, "serious", "the page is wider than the screen"))

    def dialog(self, opener: str, name: str) -> None:
        self._tab.page.locator(opener).first.click()
        self._tab.see(f"#{name}[open]")
        self.look(name)
        self._tab.page.keyboard.press("Escape")


@pytest.mark.parametrize("look", LOOKS)
def test_no_view_has_a_serious_violation(look: str, served: Served, axe: str, tmp_path: Path) -> None:
    Errands(tmp_path).photo(tmp_path / "a.png")
    with chromium() as browser:
        tab = open_tab(browser, served.url, **LOOKS[look])
        judge, page = Judge(tab, axe), tab.page
        tab.see("#results li:nth-child(3)")
        for zone in ("#init-drop", "#control-drop"):
            tab.drop(zone, [tmp_path / "a.png"])
        page.click("#lora-add")
        page.click("#create-more >> xpath=../summary")
        page.check("#results li:nth-child(1) input")
        page.check("#results li:nth-child(2) input")
        tab.see("#control-picture")
        judge.look("create")
        judge.dialog("#results .tile", "viewer")
        judge.dialog("#view-create .compare-open", "compare")
        judge.dialog("#mask-open", "painter")
        fill_in(page, prompt="a red star", count=8, steps=100)
        page.click("#make")
        tab.see("#queue .job")
        judge.look("queue")
        page.click("#queue button:has-text('Cancel')")
        go(tab, "train")
        fill_in(page, run_name="other", trigger="zorp")
        tab.see("#plan-warnings li")
        tab.see("#run-panel polyline")
        page.click("#train-more >> xpath=../summary")
        judge.look("train")
        go(tab, "library")
        tab.see("#loras .problem", "broken")
        judge.look("library")
        judge.dialog("#loras >> text=Details", "inspect")
        judge.dialog("#loras >> text=Convert or merge", "convert")
        assert judge.found == []


def test_the_question_for_the_key_and_the_page_of_interfaces(axe: str, tmp_path: Path) -> None:
    with serving(tmp_path, api_key="secret") as served, chromium() as browser:
        judge = Judge(tab := open_tab(browser, served.url), axe)
        fill_in(tab.page, key="wrong")
        tab.page.press("#key", "Enter")
        tab.see("#login-problem", "This is not the API key.")
        judge.look("login")
        fill_in(tab.page, key="secret")
        tab.page.press("#key", "Enter")
        make(tab, "a red star", 1)
        tab.page.goto(f"{served.url}/docs")
        judge = Judge(tab, axe)
        judge.look("docs")
        assert judge.found == []
        tab.page.evaluate("document.querySelector('main').append(document.createElement('img'))")
        judge.look("planted")
        assert [each[:3] for each in judge.found] == [("planted", "critical", "image-alt")]
