"""The interface of AUTOMATIC1111, by the calls that its clients make."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.errands import Errands
from support.serving import Served, serving

SMALL = {"prompt": "a red star", "width": 32, "height": 32, "steps": 2, "cfg_scale": 1, "seed": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("studio")
    with serving(folder) as running:
        Errands(folder).lora(folder / "loras" / "fox.safetensors")
        yield running


def post(served: Served, path: str, **fields: Any) -> dict[str, Any]:
    answer = served.client.post(f"/sdapi/v1/{path}", json={**SMALL, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_open_webui_generates(served: Served) -> None:
    """As routers/images.py: the options first, then txt2img with a batch."""
    options = served.client.get("/sdapi/v1/options").json()
    assert options["sd_model_checkpoint"] == "tiny"
    assert served.client.post("/sdapi/v1/options", json=options).status_code == 200
    made = post(served, "txt2img", batch_size=2, negative_prompt="")
    info = json.loads(made["info"])
    assert len(made["images"]) == 2 and info["all_seeds"] == [3, 4] and "Steps: 2" in info["infotexts"][0]
    assert pixels(made["images"][0]).shape == (32, 32, 3)


def test_the_whole_form_of_the_web_ui_is_accepted_and_what_is_not_used_is_named(served: Served) -> None:
    form = {
        "enable_hr": False, "denoising_strength": 0, "styles": [], "subseed": -1, "subseed_strength": 0, "tiling": True,
        "restore_faces": False, "override_settings": {}, "script_args": [], "alwayson_scripts": {}, "eta": 0,
        "sampler_name": "Euler a", "n_iter": 1, "s_noise": 1.0, "send_images": True, "save_images": False,
    }  # fmt: skip
    info = json.loads(post(served, "txt2img", **form, negative_prompt="blurry")["info"])
    assert info["warnings"] == [
        "negative_prompt is not used without guidance: give cfg_scale above 1",
        "sampler euler a is not known: euler was used", "tiling is not used",
    ]  # fmt: skip


def test_a_picture_is_changed_where_the_mask_is_white(served: Served) -> None:
    start, mask = Image.new("RGB", (32, 32), (200, 30, 60)), Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    data = []
    for each in (start, mask):
        each.save(buffer := io.BytesIO(), "PNG")
        data.append(base64.b64encode(buffer.getvalue()).decode())
    fields = {"init_images": [f"data:image/png;base64,{data[0]}"], "mask": data[1], "denoising_strength": 1.0}
    for inverted in (0, 1):
        made = pixels(post(served, "img2img", **fields, inpainting_mask_invert=inverted)["images"][0])
        kept = made[:, :16] if inverted else made[:, 16:]
        assert (kept == [200, 30, 60]).all() and (made != [200, 30, 60]).any()


def test_loras_are_named_in_the_prompt(served: Served) -> None:
    assert [lora["name"] for lora in served.client.get("/sdapi/v1/loras").json()] == ["fox"]
    plain = post(served, "txt2img")["images"][0]
    made = post(served, "txt2img", prompt="a red <lora:fox:0.5> star")
    record = served.client.get("/api/pictures?limit=1").json()[0]["record"]
    assert record["loras"][0]["scale"] == 0.5 and record["prompt"] == "a red star"
    assert (pixels(made["images"][0]) != pixels(plain)).any()
    answer = served.client.post("/sdapi/v1/txt2img", json={**SMALL, "prompt": "x <lora:../../etc/passwd:1>"})
    assert answer.status_code == 400


def test_progress_and_interrupt(served: Served) -> None:
    answers: list[int] = []
    ask = {**SMALL, "steps": 100, "width": 64, "height": 64}
    thread = threading.Thread(
        target=lambda: answers.append(served.client.post("/sdapi/v1/txt2img", json=ask).status_code)
    )
    thread.start()
    until = time.monotonic() + 300
    while not (seen := served.client.get("/sdapi/v1/progress").json())["current_image"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert 0 < seen["progress"] <= 1 and seen["state"]["sampling_steps"] == 100
    assert served.client.post("/sdapi/v1/interrupt").status_code == 200
    thread.join(300)
    assert answers == [500]
    assert served.client.get("/sdapi/v1/progress").json()["progress"] == 0


def test_lists(served: Served) -> None:
    assert served.client.get("/sdapi/v1/sd-models").json()[0]["model_name"] == "tiny"
    assert {"euler", "heun"} <= {each["name"] for each in served.client.get("/sdapi/v1/samplers").json()}
    assert served.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "sdxl"}).status_code == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": "x"},
        {"resize_mode": [1], "path": "img2img"},
        {"loras": 1, "prompt": "x <lora:fox:1>"},
        {"width": {}},
    ],
)
def test_values_of_other_types_are_refused(served: Served, fields: dict[str, Any]) -> None:
    Image.new("RGB", (16, 16)).save(buffer := io.BytesIO(), "PNG")
    path = fields.get("path", "txt2img")
    if path == "img2img":
        fields = {**fields, "init_images": [base64.b64encode(buffer.getvalue()).decode()]}
    assert served.client.post(f"/sdapi/v1/{path}", json={**SMALL, **fields}).status_code == 400
