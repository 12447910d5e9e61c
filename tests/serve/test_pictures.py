"""The own interface for pictures: jobs, events, uploads, the gallery, cancelling, and what survives."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support.serving import SMALL, Served, engines, serving

from zimage_cli.app import main
from zimage_ref.formats.temporary import temporary_path
from zimage_ref.generation.presets import defaults_for


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("studio"), max_steps=50, max_count=4) as running:
        yield running


def png(width: int = 32, height: int = 32, mode: str = "RGB") -> bytes:
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def events(client: httpx.Client, id: str, **query: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    with client.stream("GET", f"/api/jobs/{id}/events", params=query) as stream:
        kind = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


def test_a_picture_is_the_file_that_generate_writes(served: Served, tmp_path: Path) -> None:
    made = served.make(prompt="a blue ring", seed=7, guidance=2.0, count=2)
    assert made["state"] == "done" and made["seeds"] == [7, 8]
    argv = [
        "generate",
        "--model-dir=tiny",
        "--prompt=a blue ring",
        "--seed=7",
        "--count=2",
        "--width=32",
        "--height=32",
    ]
    assert main([*argv, "--steps=2", "--guidance=2", f"--output={tmp_path}/{{seed}}.png", "--no-thumbnail"]) == 0
    for id, seed in zip(made["pictures"], (7, 8), strict=True):
        answer = served.client.get(f"/api/pictures/{id}/file")
        assert answer.headers["content-type"] == "image/png" and "immutable" in answer.headers["cache-control"]
        assert answer.content == (tmp_path / f"{seed}.png").read_bytes()


def test_events_tell_the_way_of_a_job(served: Served) -> None:
    id = served.client.post("/api/jobs", json={**SMALL, "steps": 4, "preview_steps": 2}).json()["id"]
    told = list(events(served.client, id))
    kinds = [kind for kind, _ in told if kind != "progress"]
    assert kinds == ["queued", "started", "preview", "picture", "done"]
    denoised = [facts["done"] for kind, facts in told if kind == "progress" and facts["stage"] == "denoise"]
    assert denoised == [1, 2, 3, 4]
    assert told[-1][1]["pictures"] == served.client.get(f"/api/jobs/{id}").json()["pictures"]


def test_a_stream_goes_on_after_the_last_event_that_the_client_has(served: Served) -> None:
    id = served.make()["id"]
    answer = served.client.get(f"/api/jobs/{id}/events", headers={"last-event-id": "3"})
    numbers = [int(line.removeprefix("id: ")) for line in answer.text.splitlines() if line.startswith("id: ")]
    assert numbers == list(range(4, 4 + len(numbers))) and len(numbers) >= 3


@pytest.mark.slow
def test_the_first_event_comes_at_once(served: Served) -> None:
    """Also while another picture is made."""
    busy = served.client.post("/api/jobs", json={**SMALL, "width": 128, "height": 128, "steps": 8}).json()["id"]
    waits = []
    for _ in range(5):
        began = time.perf_counter()
        id = served.client.post("/api/jobs", json=SMALL).json()["id"]
        next(events(served.client, id))
        waits.append(time.perf_counter() - began)
    assert sorted(waits)[len(waits) // 2] < 0.3  # a loaded machine; alone it is below 0.05
    served.wait(busy)


def test_uploads_start_pictures_and_masks(served: Served) -> None:
    start = served.client.post("/api/uploads", files={"file": ("../../x.exe", png(48, 32))}).json()
    assert (start["width"], start["height"], start["mask"]) == (48, 32, None)
    made = served.make(init_image=start["id"], strength=0.5, width=None, height=None)
    record = served.client.get(f"/api/pictures/{made['pictures'][0]}").json()
    assert (record["width"], record["height"]) == (48, 32) and record["record"]["strength"] == 0.5
    again = served.make(init_image=made["pictures"][0], strength=0.5)  # a result can be a start, too
    assert again["state"] == "done"
    assert served.client.get(f"/api/uploads/{start['id']}").headers["content-type"] == "image/png"


def test_the_gallery_is_searched_paged_and_emptied(served: Served) -> None:
    ids = [served.make(prompt=f"needle {i}%_ x", seed=i)["pictures"][0] for i in range(3)]
    found = served.client.get("/api/pictures", params={"search": "x needle"}).json()
    assert [each["id"] for each in found] == ids[::-1]
    page = served.client.get("/api/pictures", params={"search": "needle", "before": ids[2], "limit": 1}).json()
    assert [each["id"] for each in page] == [ids[1]]
    assert [p["id"] for p in served.client.get("/api/pictures", params={"search": "1%_"}).json()] == [ids[1]]
    assert served.client.get(f"/api/pictures/{ids[0]}/thumbnail").headers["content-type"] == "image/jpeg"
    webp = served.client.get(f"/api/pictures/{ids[0]}/file", params={"format": "webp", "download": True})
    assert webp.content[8:12] == b"WEBP" and webp.headers["content-disposition"].endswith(f'-{ids[0]}.webp"')
    assert served.client.delete(f"/api/pictures/{ids[0]}").status_code == 204
    assert served.client.get(f"/api/pictures/{ids[0]}").status_code == 404
    assert served.client.get(f"/api/pictures/{ids[0]}/file").status_code == 404


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(served: Served) -> None:
    running, waiting = (
        served.client.post("/api/jobs", json={**SMALL, "steps": 50, "seed": i}).json()["id"] for i in range(2)
    )
    assert served.client.delete(f"/api/jobs/{waiting}").json()["state"] == "cancelled"
    served.client.delete(f"/api/jobs/{running}")
    assert served.wait(running)["state"] == "cancelled"
    assert served.client.get(f"/api/jobs/{running}").json()["pictures"] == []
    assert served.make()["state"] == "done"


def test_a_client_that_leaves_its_stream_cancels_its_job(served: Served) -> None:
    id = served.client.post("/api/jobs", json={**SMALL, "steps": 50}).json()["id"]
    for kind, _ in events(served.client, id, cancel_on_leave=True):
        if kind == "progress":
            break
    assert served.wait(id)["state"] == "cancelled"


def test_clients_take_turns_and_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    with serving(tmp_path, queue_size=3) as served:

        def post(client: str, **fields: Any) -> httpx.Response:
            return served.client.post("/api/jobs", json={**SMALL, **fields}, headers={"x-client": client})

        long = post("a", steps=60).json()["id"]
        while served.client.get(f"/api/jobs/{long}").json()["state"] == "queued":
            time.sleep(0.01)
        answers = [post("a", seed=1, prompt="1"), post("a", seed=2, prompt="2"), post("b", seed=3, width=48)]
        full = post("b")
        assert [answer.status_code for answer in answers] == [202] * 3 and full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1 and "try again" in full.json()["error"]["message"]
        served.client.delete(f"/api/jobs/{long}")
        ends = [served.wait(answer.json()["id"])["id"] for answer in answers]
        order = [row["job"] for row in reversed(served.client.get("/api/pictures").json())]
        assert order.index(ends[2]) < 3 and len(order) == 3
        assert served.client.get("/api/jobs").json()[-1]["id"] == long


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": None}, "`prompt` is missing"),
        ({"prompts": "x"}, "is `prompt` meant?"),
        ({"width": 33}, "`width` 33 must be a multiple of 16"),
        ({"width": 4096, "height": 4096}, "2048 x 2048"),
        ({"steps": 51}, "`steps` 51 is more than the 50"),
        ({"count": 5}, "`count` 5 must be between 1 and 4"),
        ({"steps": "many"}, "`steps`: 'many' is not a whole number"),
        ({"prompt": ["x"]}, "is not a text"),
        ({"prompt": "x" * 20_001}, "more than 20,000 characters"),
        ({"loras": [{"name": "absent"}]}, "LoRA absent.safetensors: no such file"),
        ({"loras": [{"name": "x", "weight": 1}]}, "weight is not known"),
        ({"loras": "x"}, "`loras` is a list"),
        ({"init_image": "0" * 40}, "there is no picture with this id"),
        ({"strength": 0.5}, "`strength` needs `init_image`"),
        ({"negative_prompt": "x"}, "`negative_prompt` does nothing without guidance"),
        ({"guidance": float("inf")}, "not valid JSON"),
        ({"steps": 10**12}, "must be at most 10000"),
        ({"steps": 51}, "more than the 50"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(served: Served, fields: dict[str, Any], words: str) -> None:
    body = json.dumps({**SMALL, **fields})
    answer = served.client.post("/api/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    assert words in answer.json()["error"]["message"]


def test_numpy_serves_the_pictures_of_generate_too(tmp_path: Path) -> None:
    with serving(tmp_path / "studio", engines(backend="numpy")) as served:
        made = served.make(seed=5, steps=1)
        data = served.client.get(f"/api/pictures/{made['pictures'][0]}/file").content
        assert served.client.get("/api/model").json()["backend"] == "numpy"
    argv = ["generate", "--backend=numpy", "--model-dir=tiny", "--prompt=a red star", "--seed=5", "--width=32"]
    argv += ["--height=32", "--steps=1", "--guidance=0", f"--output={tmp_path}/a.png", "--no-thumbnail"]
    assert main(argv) == 0
    assert data == (tmp_path / "a.png").read_bytes()


def test_the_usual_options_are_told_to_clients(tmp_path: Path) -> None:
    with serving(tmp_path, replace(engines(), defaults={})) as served:
        usual = defaults_for(served.studio.model.scheduler)
        told = served.client.get("/api/model").json()
        assert told["defaults"] == {"steps": usual.steps, "guidance": usual.guidance}
        assert told["name"] == "tiny"


def test_equal_requests_are_denoised_together(tmp_path: Path) -> None:
    with serving(tmp_path, batch_size=4, memory="fast") as served:

        def post(**fields: Any) -> str:
            id: str = served.client.post("/api/jobs", json={**SMALL, **fields}).json()["id"]
            return id

        first = post(width=16, height=16, steps=30)  # the others wait for it
        ids = [post(seed=i) for i in range(4)]
        ends = [served.wait(id) for id in (first, *ids)]
        assert {end["state"] for end in ends} == {"done"}
        told = [list(events(served.client, id)) for id in ids]
        encoded = next(facts["total"] for kind, facts in told[0] if kind == "progress")
        steps = [[f["done"] for kind, f in each if kind == "progress" and f["stage"] == "denoise"] for each in told]
        assert steps == [[1, 2]] * 4 and encoded == 1  # two steps of one batch, and one prompt


@pytest.mark.slow
def test_jobs_that_fail_together_are_made_anew_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, memory="lean") as served:
        save, saved = served.studio.store.save, []

        def failing(*values: Any) -> Any:
            saved.append(values)
            if len(saved) == 3:
                raise OSError("once")
            return save(*values)

        monkeypatch.setattr(served.studio.store, "save", failing)
        first = {"width": 16, "height": 16, "steps": 30}  # the others wait for it
        asked = (first, {"seed": 1, "count": 2}, {"seed": 8, "count": 2})
        ids = [served.client.post("/api/jobs", json={**SMALL, **fields}).json()["id"] for fields in asked]
        ends = [served.wait(id) for id in ids]
        assert [(end["state"], len(end["pictures"])) for end in ends] == [("done", 1), ("done", 2), ("done", 2)]
        assert len(saved) == 7 and len(list(served.studio.store.pictures.glob("*.png"))) == 5


@pytest.mark.slow
def test_a_model_that_is_not_used_leaves_memory(tmp_path: Path) -> None:
    with serving(tmp_path, idle_minutes=0.01) as served:
        assert served.make()["state"] == "done"
        until = time.monotonic() + 20
        while served.client.get("/api/status").json()["model_loaded"]:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert served.make()["state"] == "done"


def test_a_new_server_shows_what_the_old_one_made(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        made = served.make(seed=4)
    lost = tmp_path / "pictures" / f"{made['pictures'][0]}.png"
    orphan = tmp_path / "pictures" / "0123456789ab-0123456789ab.png"
    orphan.write_bytes(lost.read_bytes())  # written, but the server was killed before its row
    with serving(tmp_path) as served:
        found = {each["id"]: each["record"]["seed"] for each in served.client.get("/api/pictures").json()}
        assert found == {made["pictures"][0]: 4, orphan.stem: 4}
        assert served.client.get(f"/api/jobs/{made['id']}").json()["state"] == "done"
        assert [kind for kind, _ in events(served.client, made["id"])] == ["done"]


def test_a_new_server_deletes_what_the_old_one_left_half_written(tmp_path: Path) -> None:
    """In each of its folders, and it begins although a picture with the name of a result is cut off."""
    with serving(tmp_path) as served:
        made = served.make()
    whole = tmp_path / "pictures" / f"{made['pictures'][0]}.png"
    whole.with_stem("0123456789ab-0123456789ab").write_bytes(whole.read_bytes()[:-200])
    (tmp_path / "datasets" / "dog").mkdir()
    homes = (tmp_path, *(tmp_path / name for name in ("pictures", "uploads", "loras", "datasets/dog")))
    left = [temporary_path(home / "a.png") for home in homes]
    for path in left:
        path.touch()
    with serving(tmp_path) as served:
        assert [path for path in left if path.exists()] == []
        assert [each["id"] for each in served.client.get("/api/pictures").json()] == made["pictures"]


def test_two_servers_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path):
        assert main(["serve", f"--folder={tmp_path}", "--port=0"]) == 1
    assert "another server uses it" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_server_that_stops_ends_jobs_and_streams(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        ids = [served.client.post("/api/jobs", json={**SMALL, "seed": i}).json()["id"] for i in range(4)]
        ended: list[str] = []
        thread = threading.Thread(target=lambda: ended.extend(kind for kind, _ in events(served.client, ids[-1])))
        thread.start()
        time.sleep(0.2)
        served.studio.close()
        thread.join(30)
        assert ended and ended[-1] in ("failed", "done")
        assert served.client.get("/health").status_code == 503


def test_a_picture_that_cannot_be_saved_fails_alone(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        folder = served.studio.store.pictures
        folder.rename(tmp_path / "gone")
        folder.write_text("in its place", encoding="utf-8")
        failed = served.make()
        assert failed["state"] == "failed" and "cannot be saved" in failed["error"]
        assert str(tmp_path) not in failed["error"]
        folder.unlink()
        (tmp_path / "gone").rename(folder)
        assert served.make()["state"] == "done"
