"""The interface of OpenAI, judged by the official client and by the calls that Open WebUI makes."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support.serving import Served, serving

SMALL = {"steps": 2, "guidance": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("studio"), api_key="secret") as running:
        running.client.headers["authorization"] = "Bearer secret"
        yield running


def picture(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def png(size: tuple[int, int] = (32, 32), hole: bool = False) -> bytes:
    made, buffer = Image.new("RGBA", size, (200, 30, 60, 255)), io.BytesIO()
    if hole:
        made.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    made.save(buffer, "PNG")
    return buffer.getvalue()


def post(served: Served, **fields: Any) -> httpx.Response:
    return served.client.post(
        "/v1/images/generations", json={"prompt": "a red star", "size": "32x32", **SMALL, **fields}
    )


def test_open_webui_generates(served: Served) -> None:
    """As routers/images.py asks with the engine openai: all of its fields, a version in the URL, a bearer."""
    body = {"model": "tiny", "prompt": "a red star", "n": 2, "size": "32x32", "response_format": "b64_json", **SMALL}
    answer = served.client.post("/v1/images/generations?api-version=1", json=body)
    images = answer.json()["data"]
    assert [picture(image["b64_json"]).size for image in images] == [(32, 32)] * 2
    assert images[0]["b64_json"] != images[1]["b64_json"]


def test_open_webui_fetches_urls_with_its_key(served: Served) -> None:
    (image,) = post(served, response_format="url").json()["data"]
    assert httpx.get(image["url"], trust_env=False).status_code == 401
    fetched = served.client.get(image["url"])
    assert fetched.headers["content-type"] == "image/png" and Image.open(io.BytesIO(fetched.content)).size == (32, 32)


def test_open_webui_edits(served: Served) -> None:
    """One picture as the field image, with a name that has a suffix; several would be image[]."""
    data = {
        "model": "tiny",
        "prompt": "a red star",
        "n": "1",
        "response_format": "b64_json",
        "steps": "2",
        "guidance": "0",
    }
    for field in ("image", "image[]"):
        answer = served.client.post("/v1/images/edits", data=data, files={field: ("a.png", png(), "image/png")})
        assert picture(answer.json()["data"][0]["b64_json"]).size == (32, 32)
    two = [("image[]", ("a.png", png(), "image/png"))] * 2
    assert (
        "takes one picture" in served.client.post("/v1/images/edits", data=data, files=two).json()["error"]["message"]
    )


def test_transparent_parts_of_the_mask_or_the_picture_change_and_no_others(served: Served) -> None:
    data = {"prompt": "a star", "response_format": "b64_json", "steps": "2", "guidance": "0", "seed": "1"}
    whole = {"image": ("a.png", png(), "image/png")}
    for files in (whole | {"mask": ("m.png", png(hole=True), "image/png")}, {"image": ("a.png", png(hole=True))}):
        answer = served.client.post("/v1/images/edits", data=data, files=files)
        pixels = np.asarray(picture(answer.json()["data"][0]["b64_json"]))
        assert (pixels[:, 16:] == [200, 30, 60]).all() and (pixels[:, :16] != [200, 30, 60]).any()


def test_formats_and_what_is_not_used_are_named(served: Served) -> None:
    answer = post(served, output_format="webp", quality="hd", style="vivid", seed=5).json()
    assert picture(answer["data"][0]["b64_json"]).format == "WEBP" and answer["output_format"] == "webp"
    assert answer["warnings"] == ["quality is not used", "style is not used"] and answer["seeds"] == [5]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "wide"}, "`size` must be WIDTHxHEIGHT"), ({"size": "33x32"}, "multiple of 16"),
        ({"n": 11}, "`count` 11 must be between"), ({"nonsense": 1}, "`nonsense` is not known"),
        ({"output_format": "gif"}, "`gif` is not a format"), ({"background": "transparent"}, "opaque"),
        ({"response_format": "file"}, "url or b64_json"), ({"partial_images": 9, "stream": True}, "between 0 and 3"),
        ({"prompt": None}, "`prompt` is missing"),
    ],
)  # fmt: skip
def test_errors_have_the_form_that_clients_read(served: Served, fields: dict[str, Any], words: str) -> None:
    answer = post(served, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert words in error["message"] and error.keys() == {"message", "type", "param", "code"}


def test_a_client_that_leaves_cancels_its_job(served: Served) -> None:
    with pytest.raises(httpx.ReadTimeout):
        served.client.post(
            "/v1/images/generations", timeout=0.5,
            json={"prompt": "left", "size": "64x64", "steps": 100, "guidance": 3},
        )  # fmt: skip
    until = time.monotonic() + 20
    while (job := served.client.get("/api/jobs?limit=1").json()[0])["state"] != "cancelled":
        assert time.monotonic() < until, job


def test_a_stream_ends_with_the_picture(served: Served) -> None:
    answer = post(served, stream=True, partial_images=1, steps=4)
    texts = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    kinds = [lines[0] for lines in texts]
    assert kinds == ["event: image_generation.partial_image", "event: image_generation.completed"]
    assert json.loads(texts[0][1].removeprefix("data: "))["partial_image_index"] == 0


@pytest.fixture
def official(served: Served) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with httpx.Client(trust_env=False) as http:
        yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret", http_client=http)


@pytest.mark.oracle
def test_the_official_client_generates_lists_and_streams(official: Any) -> None:
    assert [model.id for model in official.models.list()] == ["tiny"]
    assert official.models.retrieve("tiny").object == "model"
    asked = {"model": "tiny", "prompt": "a red star", "size": "32x32", "extra_body": {"steps": 6, "seed": 3}}
    whole = official.images.generate(**asked, n=2, response_format="b64_json")
    assert len(whole.data) == 2 and whole.size == "32x32" and picture(whole.data[0].b64_json).size == (32, 32)
    url = official.images.generate(**asked, response_format="url").data[0].url
    assert "/api/pictures/" in url
    events = list(official.images.generate(**asked, stream=True, partial_images=2, output_format="jpeg"))
    assert [event.type.split(".")[1] for event in events] == ["partial_image", "partial_image", "completed"]
    assert [picture(event.b64_json).format for event in events] == ["JPEG"] * 3


@pytest.mark.oracle
def test_the_official_client_edits_with_a_mask(official: Any) -> None:
    asked = {"model": "tiny", "prompt": "a star", "extra_body": {"steps": 6, "seed": 3}}
    pictures = {"image": ("a.png", png()), "mask": ("m.png", png(hole=True))}
    made = official.images.edit(**asked, **pictures, response_format="b64_json")
    assert (np.asarray(picture(made.data[0].b64_json))[:, 16:] == [200, 30, 60]).all()
    events = list(official.images.edit(**asked, **pictures, stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.oracle
def test_the_official_client_understands_errors(official: Any, served: Served) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="must be a multiple of 16"):
        official.images.generate(model="tiny", prompt="x", size="33x32")
    with pytest.raises(openai.AuthenticationError):
        official.with_options(api_key="wrong").models.list()
