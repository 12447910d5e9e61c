"""ControlNets: found by name in their folder, used by every interface, and their pictures are `zimage generate`'s."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.errands import Errands
from support.serving import SMALL, Served, serving

from zimage_cli.app import main

NET, SCALE = "net.safetensors", 0.7


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    with serving(home / "studio") as running:
        folder = home / "studio" / "controls"
        Errands(home).control(folder / NET)
        (folder / "broken.safetensors").write_bytes(b"no weights")
        Errands(home).control(home / "outside.safetensors")
        (folder / "link.safetensors").symlink_to(home / "outside.safetensors")
        yield running


def photo(folder: Path) -> bytes:
    Errands(folder).photo(path := folder / "photo.png")
    return path.read_bytes()


def upload(served: Served, data: bytes) -> str:
    id: str = served.client.post("/api/uploads", files={"file": ("a.png", data)}).json()["id"]
    return id


def last(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = served.client.get("/api/pictures?limit=1").json()[0]
    return found


def test_they_are_listed_by_name_with_what_is_wrong(served: Served) -> None:
    broken, good = served.client.get("/api/controls").json()
    assert good["name"] == NET and good["problem"] is None and good["variant"].startswith("2.1 lite: 1 block")
    assert broken["problem"].startswith("broken.safetensors") and str(served.studio.settings.folder) not in str(broken)


def test_a_picture_that_follows_is_that_of_the_command_line(served: Served, tmp_path: Path) -> None:
    id, folder = upload(served, photo(tmp_path)), served.studio.settings.folder
    made = served.make(control="net", control_image=id, control_scale=SCALE, control_end=0.5, seed=3)
    out = tmp_path / "same.png"
    argv = ["generate", "--model-dir=tiny", "--prompt", SMALL["prompt"], "--width=32", "--height=32", "--steps=2"]
    argv += ["--guidance=0", "--seed=3", f"--control={folder / 'controls' / NET}:{SCALE}", "--control-end=0.5"]
    assert main([*argv, f"--control-image={folder / 'uploads' / id}.png", f"--output={out}"]) == 0
    file = served.client.get(f"/api/pictures/{made['pictures'][0]}/file").content
    assert Image.open(io.BytesIO(file)).tobytes() == Image.open(out).tobytes()
    plain = served.client.get(f"/api/pictures/{served.make(seed=3)['pictures'][0]}/file").content
    assert Image.open(io.BytesIO(plain)).tobytes() != Image.open(out).tobytes()


def test_openai_takes_a_picture_to_follow_as_id_base64_or_file(served: Served, tmp_path: Path) -> None:
    data = photo(tmp_path)
    text = base64.b64encode(data).decode()
    body = {"prompt": "a red star", "size": "32x32", "steps": 2, "guidance": 0, "seed": 3, "control": NET}
    for picture in (upload(served, data), text, f"data:image/png;base64,{text}"):
        answer = served.client.post("/v1/images/generations", json={**body, "control_image": picture})
        assert answer.status_code == 200, answer.text
        assert "control_fingerprint" in last(served)["record"]
    form = {"prompt": "a red star", "steps": "2", "guidance": "0", "control": NET, "control_scale": "0.5"}
    files = {"image": ("a.png", data), "control_image": ("b.png", data)}
    assert served.client.post("/v1/images/edits", data=form, files=files).status_code == 200
    assert last(served)["record"]["control"].endswith(f"{NET}:0.5")


def test_a_unit_of_the_extension_of_automatic1111(served: Served, tmp_path: Path) -> None:
    text = base64.b64encode(photo(tmp_path)).decode()
    unit = {"image": text, "module": "grayscale", "model": "net [ab12cd34]", "weight": 0.5, "guidance_end": 0.5}
    body = {**SMALL, "alwayson_scripts": {"ControlNet": {"args": [{"enabled": False}, unit]}, "Other": {"args": []}}}
    answer = served.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200 and "script other is not used" in answer.json()["info"]
    record = last(served)["record"]
    assert record["control"].endswith(f"{NET}:0.5")
    assert (record["control_kind"], record["control_end"]) == ("gray", 0.5)
    assert served.client.get("/controlnet/model_list").json()["model_list"] == ["broken.safetensors", NET]
    assert "none" in served.client.get("/controlnet/module_list").json()["module_list"]
    assert served.client.get("/controlnet/version").json() == {"version": 2}
    for scripts in (
        {"controlnet": {"args": [unit, unit]}}, {"controlnet": {"args": [{**unit, "image": "?"}]}}, [1],
        {"controlnet": {"args": [{**unit, "model": "../../outside"}]}},
    ):  # fmt: skip
        assert served.client.post("/sdapi/v1/txt2img", json={**SMALL, "alwayson_scripts": scripts}).status_code == 400


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"control": "../outside"}, "a name is 1 to 100"), ({"control": "link"}, "ControlNet link: no such file"),
        ({"control": "/etc/passwd"}, "a name is 1 to 100"), ({"control": "broken"}, "broken.safetensors"),
        ({"control": "net"}, "`control` needs `control_image`"), ({"control_scale": 1}, "needs `control`"),
        ({"control": "net", "control_scale": 1e9}, "`control_scale`"), ({"control_image": "ID"}, "needs `control`"),
        ({"control": "net", "control_image": "../../x"}, "no such id"),
        ({"control": "net", "control_image": "ID", "control_kind": "pose"}, "this map is not made here"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_without_a_path(
    served: Served, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    if fields.get("control_image") == "ID":
        fields = {**fields, "control_image": upload(served, photo(tmp_path))}
    answer = served.client.post("/api/jobs", json={**SMALL, **fields})
    assert answer.status_code in (400, 404) and words in answer.json()["detail"], answer.text
    assert str(served.studio.settings.folder) not in answer.text
