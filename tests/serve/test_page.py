"""The files of the page: served to anybody, without data, inline code or another host; and what it asks for."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.networks import mlx_only
from support.serving import Served, serving

from zimage_ref.training.config import TrainConfig
from zimage_ref.training.presets import PRESETS
from zimage_serve.work.presets import ABOUT, presets
from zimage_serve.work.runs import NOT_ASKED

PAGE = Path(__file__).parents[2] / "zimage_serve" / "page"
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.glob("*.js"))}
HTML = (PAGE / "index.html").read_text(encoding="utf-8")
STYLE = (PAGE / "style.css").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("studio"), api_key="secret") as running:
        yield running


def test_anybody_gets_the_page_and_nobody_its_data(served: Served) -> None:
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    home = served.client.get("/")
    assert home.status_code == 200 and home.text == HTML and home.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in home.headers["content-security-policy"]
    for path in sorted(PAGE.iterdir()):
        if path.suffix != ".html":
            answer = served.client.get(f"/page/{path.name}")
            assert answer.content == path.read_bytes() and answer.headers["content-type"].startswith(kinds[path.suffix])
    assert served.client.get("/page/absent.js").status_code == 401
    assert served.client.get("/api/model").status_code == 401


def test_the_page_has_no_inline_code_and_no_other_host() -> None:
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", HTML)
    for name, text in {**SCRIPTS, "index.html": HTML, "style.css": STYLE}.items():
        hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE)))
        assert hosts <= {"http://www.w3.org"}, name  # the name of SVG, which nobody asks for


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_writes_text_only_and_finds_what_it_names(name: str) -> None:
    text = SCRIPTS[name]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert {found.removeprefix("./") for found in re.findall(r'from "(.+?)"', text)} <= set(SCRIPTS)
    ids = set(re.findall(r'\bid="([\w-]+)"', HTML))
    assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= ids
    assert text.count("\n") <= 330


def test_every_input_of_the_page_has_a_name_for_a_screen_reader() -> None:
    labels = set(re.findall(r'<label for="([\w-]+)"', HTML))
    inputs = re.findall(r"<(?:input|select|textarea)\b[^>]*>", HTML)
    unnamed = [i for i in inputs if "hidden" not in i and re.findall(r'\bid="([\w-]+)"', i)[0] not in labels]
    assert len(inputs) > 30 and unnamed == []
    ids = re.findall(r'\bid="([\w-]+)"', HTML)
    assert len(ids) == len(set(ids))
    for names in re.findall(r'aria-(?:labelledby|describedby)="([\w -]+)"', HTML):
        assert set(names.split()) <= set(ids)


def test_presets_are_options_of_a_run() -> None:
    own = {"resolution": (128,), "lr": 1e-3}
    found = presets(own)
    assert [each["name"] for each in found] == ["lesson", *PRESETS] and presets({}) == found[1:]
    assert found[0]["options"] == own and ABOUT.keys() == PRESETS.keys()
    for each in found:
        options = each["options"]
        assert isinstance(options, dict) and not options.keys() & NOT_ASKED
        TrainConfig(Path("m"), Path("d"), **options)


@mlx_only
def test_a_plan_shows_crops_and_warns_of_pictures(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.client.put("/api/datasets/dog")
        for name, size, caption in (("a", (128, 64), ""), ("b", (64, 32), "b"), ("c", (128, 64), "c")):
            Image.new("RGB", size, "red").save(buffer := io.BytesIO(), "PNG")
            file = {"file": (f"{name}.png", buffer.getvalue())}
            served.client.post("/api/datasets/dog/pictures", files=file, data={"caption": caption})
        asked = {"name": "x", "dataset": "dog", "trigger": "zorp", "resolution": [64], "steps": 3}
        plan = served.client.post("/api/runs/plan", json=asked).json()
        crops = {each["picture"]: (each["sizes"], each["held_out"]) for each in plan["crops"]}
        assert crops == {"a.png": ([[96, 48]], False), "b.png": ([[64, 32]], False), "c.png": ([[96, 48]], False)}
        assert plan["seconds"] is None
        assert plan["warnings"] == [
            "pictures without a caption are trained with `trigger` alone (1): a.png",
            "equal pictures: a.png, c.png: delete all but one",
            "smaller than 64 x 64 (1): b.png: trained at a smaller size",
        ]
        run = served.client.post("/api/runs", json={**asked, "warmup": 1, "rank": 2}).json()["id"]
        served.client.get(f"/api/runs/{run}/events")
        known = served.client.post("/api/runs/plan", json={**asked, "steps": 6}).json()
        assert known["seconds"] > 0
        half = served.client.post("/api/runs/plan", json={**asked, "steps": 3}).json()
        assert half["seconds"] == pytest.approx(known["seconds"] / 2)


@mlx_only
def test_a_lora_is_renamed(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.client.put("/api/datasets/dog")
        Image.new("RGB", (32, 32), "red").save(buffer := io.BytesIO(), "PNG")
        served.client.post("/api/datasets/dog/pictures", files={"file": ("a.png", buffer.getvalue())})
        asked = {"name": "x", "dataset": "dog", "trigger": "zorp", "resolution": [32], "steps": 2, "save_every": 1}
        run = served.client.post("/api/runs", json={**asked, "rank": 2}).json()["id"]
        served.client.get(f"/api/runs/{run}/events")
        before = served.client.get("/api/loras/x.safetensors/file").content
        renamed = served.client.patch("/api/loras/x.safetensors", json={"name": "y z"})
        assert (renamed.json()["name"], renamed.json()["trigger"]) == ("y z.safetensors", "zorp")
        assert served.client.get("/api/loras/y z/file").content == before
        assert served.client.get("/api/loras/x.safetensors").status_code == 404
        assert served.client.patch("/api/loras/y z", json={"name": "x.step1"}).status_code == 409
        assert served.client.patch("/api/loras/y z", json={"name": "../x"}).status_code == 400
        assert served.client.patch("/api/loras/y z", json={}).status_code == 400
