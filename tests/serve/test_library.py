"""Files made of others by the server: they are those of `zimage convert`, and appear whole or not at all."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.errands import Errands
from support.serving import Served, serving

from zimage_cli.app import main
from zimage_ref.checkpoints.hub import BUILT_IN
from zimage_serve.refusals import BusyError
from zimage_serve.work.jobs import State
from zimage_serve.work.tasks import Progress, TaskDesk


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    with serving(home / "studio") as running:
        errands = Errands(home)
        errands.lora(home / "studio" / "loras" / "fox.safetensors")
        errands.lora(home / "studio" / "loras" / "owl.safetensors", rank=3)
        yield running


def made(served: Served, kind: str, **asked: Any) -> dict[str, Any]:
    """The facts of a task after its end."""
    answer = served.client.post(f"/api/{kind}/convert", json=asked)
    assert answer.status_code == 202, answer.text
    id = answer.json()["id"]
    text = served.client.get(f"/api/tasks/{id}/events").text
    assert text.startswith("id: 1\nevent: queued\n")
    facts: dict[str, Any] = served.client.get(f"/api/tasks/{id}").json()
    return facts


def weights(path: Path) -> bytes:
    """A safetensors file without its header, in which the server also names the LoRAs."""
    data = path.read_bytes()
    return data[8 + struct.unpack("<Q", data[:8])[0] :]


def test_loras_are_added_up_as_the_command_line_does(served: Served, tmp_path: Path) -> None:
    folder = served.studio.loras.folder
    task = made(served, "loras", name="both", loras=[{"name": "fox", "scale": 0.5}, "owl"], rank=4, naming="peft")
    assert (task["state"], task["name"], task["error"]) == ("done", "both.safetensors", None)
    argv = ["convert", "--model-type=lora", f"--input={folder / 'fox.safetensors'}:0.5", "--rank=4", "--naming=peft"]
    assert main([*argv, f"--input={folder / 'owl.safetensors'}", f"--output={tmp_path / 'same.safetensors'}"]) == 0
    assert (folder / "both.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    facts = next(each for each in served.client.get("/api/loras").json() if each["name"] == "both.safetensors")
    assert facts["problem"] is None and facts["rank"] == "4"
    noted = made(served, "loras", name="burnt", loras=["fox"], naming="musubi")
    assert noted["state"] == "done" and any("known to lose" in note for note in noted["notes"])


def test_a_checkpoint_is_made_inspected_renamed_and_deleted(served: Served, tmp_path: Path) -> None:
    client, folder = served.client, served.studio.checkpoints.folder
    (own,) = client.get("/api/checkpoints").json()
    assert (own["name"], own["own"], own["model_type"]) == ("model", True, "transformer")
    task = made(served, "checkpoints", name="merged", loras=["fox"], quantize=4, group_size=32)
    assert task["state"] == "done" and task["done"] == task["total"] > 0
    argv = ["convert", "--model-type=transformer", f"--input={BUILT_IN}", "--quantize=4", "--group-size=32"]
    fox = served.studio.loras.folder / "fox.safetensors"
    assert main([*argv, f"--merge-lora={fox}", f"--output={tmp_path / 'same.safetensors'}"]) == 0
    assert weights(folder / "merged.safetensors") == weights(tmp_path / "same.safetensors")
    facts = client.get("/api/checkpoints/merged").json()
    assert facts["problem"] is None and facts["precision"] == "bf16, q4" and len(facts["tensors"]) > 50
    again = made(served, "checkpoints", name="again", checkpoint="merged", dtype="bf16", naming="comfy")
    assert again["state"] == "done", again
    assert client.patch("/api/checkpoints/merged", json={"name": "new"}).json()["name"] == "new.safetensors"
    assert client.patch("/api/checkpoints/new", json={"name": "again"}).status_code == 409
    assert client.get("/api/checkpoints/new/file").content == (folder / "new.safetensors").read_bytes()
    assert client.delete("/api/checkpoints/new").status_code == 204
    assert [each["name"] for each in client.get("/api/checkpoints").json()] == ["model", "again.safetensors"]


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("loras", {}, "a name is 1 to 100"), ("loras", {"name": "../x", "loras": ["fox"]}, "a name is 1 to 100"),
        ("loras", {"name": "x"}, "`loras` is missing"), ("loras", {"name": "fox", "loras": ["owl"]}, "exists"),
        ("loras", {"name": "x", "loras": ["../../secret"]}, "a name is 1 to 100"),
        ("loras", {"name": "x", "loras": ["fox"], "naming": "none"}, "`naming` 'none' is unknown"),
        ("loras", {"name": "x", "loras": ["fox"], "output": "/tmp/x"}, "`output` is not known"),
        ("loras", {"name": "x", "loras": [{"name": "fox", "scale": 1e9}]}, "`scale`"),
        ("checkpoints", {"name": "model"}, "is the name of the server's transformer"),
        ("checkpoints", {"name": "x", "checkpoint": "/etc/passwd"}, "a name is 1 to 100"),
        ("checkpoints", {"name": "x", "quantize": 7}, "`quantize` 7 is unknown"),
        ("checkpoints", {"name": "x", "quantize": 4, "naming": "comfy"}, "joins matrices"),
        ("checkpoints", {"name": "x", "checkpoint": "lost"}, "checkpoint lost"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_at_once(served: Served, kind: str, fields: dict[str, Any], words: str) -> None:
    answer = served.client.post(f"/api/{kind}/convert", json=fields)
    assert answer.status_code in (400, 404, 409) and words in answer.json()["detail"], answer.text
    assert str(served.studio.settings.folder) not in answer.text


def test_the_servers_own_transformer_stays(served: Served) -> None:
    assert served.client.delete("/api/checkpoints/model").status_code == 400
    assert served.client.get("/api/checkpoints/model/file").status_code == 400
    assert served.client.patch("/api/checkpoints/model", json={"name": "x"}).status_code == 400
    assert (BUILT_IN / "transformer").is_dir()


def test_a_task_that_is_cancelled_leaves_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = served.studio.checkpoints.folder
    before, add = sorted(folder.iterdir()), served.studio.tasks.add

    def cancelled(kind: str, name: str, making: Any) -> Any:
        def slow(progress: Progress) -> list[str]:
            def late(done: int, total: int) -> None:
                if done > total / 2:
                    task.cancelled.set()
                progress(done, total)

            while "task" not in found:
                time.sleep(0.01)
            task = found["task"]
            result: list[str] = making(late)
            return result

        found["task"] = add(kind, name, slow)
        return found["task"]

    found: dict[str, Any] = {}
    monkeypatch.setattr(served.studio.tasks, "add", cancelled)
    assert made(served, "checkpoints", name="half")["state"] == "cancelled"
    assert sorted(folder.iterdir()) == before


def test_tasks_are_bounded_and_end_with_the_desk() -> None:
    desk = TaskDesk()

    def endless(progress: Progress) -> list[str]:
        while True:
            progress(1, 2)
            time.sleep(0.01)

    tasks = [desk.add("lora", f"{i}", endless) for i in range(8)]
    with pytest.raises(BusyError, match="8 files are in the making already"):
        desk.add("lora", "more", endless)
    assert desk.makes("lora", "3") and not desk.makes("checkpoint", "3")
    desk.close()
    desk.join(10)
    assert {task.state for task in tasks} == {State.FAILED}
    assert {task.error for task in tasks} == {"the server was stopped before this was done"}
