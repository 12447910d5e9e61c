"""Training runs: planned, trained, paused for pictures, stopped, resumed; the bytes are those of `zimage train`."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.networks import mlx_only
from support.serving import Served, serving

from zimage_cli.app import main

OPTIONS: dict[str, Any] = {
    "name": "fox", "dataset": "dog", "trigger": "zorp", "resolution": [32], "steps": 2, "rank": 2, "warmup": 1,
}  # fmt: skip


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as running:
        dataset(running)
        yield running


def dataset(served: Served) -> None:
    assert served.client.put("/api/datasets/dog").status_code == 201
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        file = {"file": (f"{i}.png", buffer.getvalue())}
        answer = served.client.post("/api/datasets/dog/pictures", files=file, data={"caption": "a [trigger]"})
        assert answer.json()["caption"] == "a [trigger]"


def start(served: Served, **options: Any) -> str:
    answer = served.client.post("/api/runs", json={**OPTIONS, **options})
    assert answer.status_code == 202, answer.text
    id: str = answer.json()["id"]
    return id


def reaches(served: Served, id: str, *states: str, step: int = 0) -> dict[str, Any]:
    until = time.monotonic() + 120
    while True:
        run: dict[str, Any] = served.client.get(f"/api/runs/{id}").json()
        if run["state"] in states and run["step"] >= step:
            return run
        assert run["state"] != "failed" and time.monotonic() < until, run
        time.sleep(0.02)


@mlx_only
def test_captions_are_edited(served: Served) -> None:
    answer = served.client.patch("/api/datasets/dog/captions", json={"1.png": "  new  ", "2.png": ""})
    assert [each["caption"] for each in answer.json()["pictures"]] == ["a [trigger]", "new", ""]
    untriggered = {name: value for name, value in OPTIONS.items() if name != "trigger"}
    problem = served.client.post("/api/runs/plan", json=untriggered)
    assert problem.status_code == 400 and problem.json()["detail"].startswith("2.png: has no caption")
    assert served.client.get("/api/datasets/dog/pictures/1.png/thumbnail").headers["content-type"] == "image/jpeg"
    assert served.client.delete("/api/datasets/dog/pictures/2.png").status_code == 204
    assert served.client.post("/api/runs/plan", json=OPTIONS).json()["pictures"] == 2


def test_sizes_of_pictures_follow_their_files(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "dog"
    Image.new("RGB", (48, 16)).save(folder / "1.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-40])
    (folder / "3.png").symlink_to(folder / "absent.png")
    (folder / "4.png").mkdir()
    shown = served.client.get("/api/datasets/dog").json()["pictures"]
    assert [(each.get("width"), each.get("height")) for each in shown[:2]] == [(32, 32), (48, 16)]
    assert [each["problem"] for each in shown] == [None, None, *["cannot be read as a picture"] * 3]


@mlx_only
def test_a_run_is_planned_trained_and_used(served: Served, tmp_path: Path) -> None:
    plan = served.client.post("/api/runs/plan", json=OPTIONS).json()
    assert (plan["pictures"], plan["steps"], plan["sizes"][0]["width"]) == (3, 2, 32) and plan["memory_bytes"] > 0
    id = start(served, preview_prompt=["a zorp"], preview_every=1, preview_size=32, preview_steps=1, save_every=1)
    text = served.client.get(f"/api/runs/{id}/events").text
    for kind in ("running", "prepared", "begun", "step", "preview", "saved", "done"):
        assert f"event: {kind}\n" in text or kind in ("running", "prepared")
    run = reaches(served, id, "done")
    assert run["lora"] == "fox.safetensors" and run["checkpoints"] == ["fox.step1.safetensors"]
    lines = served.client.get(f"/api/runs/{id}/metrics").json()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    preview = next(line["preview"] for line in lines if "preview" in line).rpartition("/")[2]
    assert served.client.get(f"/api/runs/{id}/previews/{preview}").headers["content-type"] == "image/png"
    assert next(each for each in served.client.get("/api/loras").json() if each["name"] == "fox.safetensors")["trigger"]
    assert served.make(prompt="a zorp", loras=[{"name": "fox"}])["state"] == "done"
    assert served.client.post("/api/runs", json=OPTIONS).status_code == 409
    assert served.client.post("/api/runs", json={**OPTIONS, "name": "b", "lr": "fast"}).status_code == 400
    whole = served.client.post("/api/runs", json={**OPTIONS, "name": "b", "kind": "full"})
    assert whole.status_code == 400 and "use zimage train" in whole.json()["detail"]
    path = str(tmp_path / "loras" / "fox.safetensors")
    assert served.client.post("/api/runs", json={**OPTIONS, "name": "b", "init_lora": path}).status_code in (400, 404)
    onward = reaches(served, start(served, name="b", steps=1, init_lora="fox"), "done")
    assert onward["options"]["init_lora"] == "fox.safetensors"


@pytest.mark.slow
@mlx_only
def test_pictures_pause_a_run_and_change_nothing_of_it(served: Served, tmp_path: Path) -> None:
    id = start(served, steps=30)
    reaches(served, id, "running", step=3)
    made = served.make()
    assert made["state"] == "done"
    assert served.client.get(f"/api/runs/{id}").json()["state"] == "paused"
    assert served.client.get("/api/status").json()["training"]["id"] == id
    assert reaches(served, id, "done")["step"] == 30
    argv = ["train", "--model-dir=tiny", f"--dataset={tmp_path}/datasets/dog", "--trigger=zorp", "--resolution=32"]
    argv += ["--steps=30", "--rank=2", "--warmup=1", f"--output={tmp_path}/same.safetensors"]
    assert main(argv) == 0
    assert (tmp_path / "loras" / "fox.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()


@pytest.mark.slow
@mlx_only
def test_a_run_goes_on_after_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        dataset(served)
        id = start(served, steps=40)
        reaches(served, id, "running", step=2)
    with serving(tmp_path) as served:
        run = served.client.get("/api/runs").json()[0]
        assert (run["id"], run["state"], run["can_resume"]) == (id, "stopped", True) and 2 <= run["step"] < 40
        assert served.client.post(f"/api/runs/{id}/resume").status_code == 200
        assert reaches(served, id, "done")["step"] == 40
        lines = served.client.get(f"/api/runs/{id}/metrics").json()
        assert [line["step"] for line in lines] == list(range(1, 41))


@pytest.mark.slow
@mlx_only
def test_a_run_is_stopped_by_its_client_and_pictures_can_wait(tmp_path: Path) -> None:
    with serving(tmp_path, while_training="wait") as served:
        dataset(served)
        id = start(served, steps=100_000)
        reaches(served, id, "running", step=2)
        job = served.client.post("/api/jobs", json={"prompt": "x", "width": 32, "height": 32, "steps": 1}).json()
        time.sleep(0.3)
        assert served.client.get(f"/api/jobs/{job['id']}").json()["state"] == "queued"
        assert served.client.post(f"/api/runs/{id}/stop").status_code == 200
        assert reaches(served, id, "stopped")["can_resume"]
        assert served.wait(job["id"])["state"] == "done"
        assert served.client.post(f"/api/runs/{id}/stop").status_code == 409


def png(size: tuple[int, int] = (32, 32), color: object = "red", mode: str = "RGB") -> bytes:
    Image.new(mode, size, color).save(buffer := io.BytesIO(), "PNG")  # type: ignore[arg-type]
    return buffer.getvalue()


@mlx_only
def test_masks_of_pictures_are_kept_checked_and_learned(served: Served) -> None:
    client, path = served.client, "/api/datasets/dog"
    assert client.put(f"{path}/pictures/0.png/mask", files={"file": ("m.png", png(color="white"))}).json()["mask"]
    sent = client.post(f"{path}/pictures", files={"file": ("1.mask.png", png(color="white"))})
    assert sent.status_code == 201 and sent.json()["name"] == "1.png"
    half = Image.new("RGBA", (32, 32), (9, 9, 9, 255))
    half.paste((0, 0, 0, 0), (0, 0, 16, 32))
    half.save(buffer := io.BytesIO(), "PNG")
    assert client.post(f"{path}/pictures", files={"file": ("cut.png", buffer.getvalue())}).json()["mask"]
    mask = Image.open(io.BytesIO(client.get(f"{path}/pictures/cut.png/mask").content))
    assert (mask.getpixel((3, 3)), mask.getpixel((20, 3))) == (0, 255)
    shown = client.get(path).json()["pictures"]
    assert [(each["name"], each["mask"]) for each in shown] == [
        ("0.png", True), ("1.png", True), ("2.png", False), ("cut.png", True)
    ]  # fmt: skip
    plan = client.post("/api/runs/plan", json={**OPTIONS, "mask": "file"}).json()
    assert plan["pictures"] == 4 and any("without a mask" in text and "2.png" in text for text in plan["warnings"])
    assert any("mask" in text for text in client.post("/api/runs/plan", json=OPTIONS).json()["warnings"])
    for name, data, words in (
        ("0.png", png((16, 16)), "has 16 x 16 pixels"), ("0.png", png(color="black"), "black everywhere"),
        ("lost.png", png(), "no such file"), ("0.png", b"x", "0.mask.png"),
    ):  # fmt: skip
        answer = client.put(f"{path}/pictures/{name}/mask", files={"file": ("m.png", data)})
        assert answer.status_code in (400, 404) and words in answer.json()["detail"], answer.text
        assert str(served.studio.settings.folder) not in answer.text
    lost = client.post(f"{path}/pictures", files={"file": ("lost.mask.png", png(color="white"))})
    assert lost.status_code == 400 and "no picture lost" in lost.text
    assert client.delete(f"{path}/pictures/0.png/mask").json()["mask"] is False
    assert client.delete(f"{path}/pictures/1.png").status_code == 204
    left = {each.name for each in (served.studio.datasets.folder / "dog").iterdir()}
    assert left == {"0.png", "0.txt", "2.png", "2.txt", "cut.png", "cut.mask.png"}
    assert client.post("/api/runs/plan", json={**OPTIONS, "mask": "alpha"}).status_code == 400


@mlx_only
def test_a_run_has_pictures_of_the_class_beside_its_own(served: Served) -> None:
    served.client.put("/api/datasets/dogs")
    file = {"file": ("0.png", png())}
    served.client.post("/api/datasets/dogs/pictures", files=file, data={"caption": "a dog"})
    asked = {**OPTIONS, "regularization": "dogs"}
    plan = served.client.post("/api/runs/plan", json=asked).json()
    assert plan["pictures"] == 4 and [each["picture"] for each in plan["crops"]] == ["0.png", "1.png", "2.png"]
    run = reaches(served, start(served, regularization="dogs", kind="lokr", steps=2), "done")
    assert (run["options"]["dataset"], run["options"]["regularization"]) == ("dog", "dogs")
    again = served.studio.runs._restored(served.studio.store.database.runs()[0])
    assert [each.folder.name for each in again.config.sets] == ["dog", "dogs"]
    assert served.client.post("/api/runs/plan", json={**asked, "regularization": "../dogs"}).status_code == 400
