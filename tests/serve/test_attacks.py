"""Attacks: names that are paths, foreign pages, keys, lying and endless uploads, script, slow clients."""

from __future__ import annotations

import io
import json
import logging
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.errands import Errands
from support.serving import SMALL, Served, serving

from zimage_cli.app import main
from zimage_serve.refusals import UnknownError
from zimage_serve.settings import ServeSettings
from zimage_serve.store.names import file_in
from zimage_serve.web.access import Gate, same_origin

SECRET = "the content of a file outside"
PATHS = ["../../secret.safetensors", "link.safetensors"]
MORE_PATHS = [
    "../secret", "..%2f..%2fsecret", "%2e%2e/secret.png", "/etc/passwd", "....//secret",
    "..\\secret.png", "secret.png\0.png", "~/secret", "file:///etc/passwd", "C:\\secret.png", "nul", ".hidden",
    "a/../b", "", " ", "x" * 300, "\u202egnp.exe",
]  # fmt: skip
JSON = {"content-type": "application/json"}
SCRIPT = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    for name in ("secret", "secret.png", "secret.safetensors", "secret.txt"):
        (home / name).write_text(SECRET, encoding="utf-8")
    folder = home / "studio"
    with serving(folder, max_upload_mb=1, max_lora_mb=2) as running:
        (folder / "loras" / "link.safetensors").symlink_to(home / "secret.safetensors")
        running.client.put("/api/datasets/good")
        yield running


def png(width: int = 16, height: int = 16) -> bytes:
    Image.new("RGB", (width, height)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def raw(served: Served, text: bytes, wait: float = 5.0, half: bool = False) -> bytes:
    """What the server answers to bytes on a connection. half: no more bytes will be sent."""
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=wait) as connection:
        connection.sendall(text)
        if half:
            connection.shutdown(socket.SHUT_WR)
        got = b""
        try:
            while piece := connection.recv(65536):
                got += piece
        except TimeoutError:
            pass
        return got


def library_requests(client: httpx.Client, path: str, quoted: str) -> list[httpx.Response]:
    """The answers to requests for masks, LoRAs and checkpoints that name `path`."""
    return [
        client.put(f"/api/datasets/good/pictures/{quoted}/mask", files={"file": ("m.png", png())}),
        client.post("/api/datasets/good/pictures", files={"file": (f"{path}.mask.png", png())}),
        client.post("/api/loras/convert", json={"name": path, "loras": ["good"]}),
        client.post("/api/loras/convert", json={"name": "x", "loras": [path]}),
        client.post("/api/checkpoints/convert", json={"name": f"/{path}"}),
        client.post("/api/checkpoints/convert", json={"name": "x", "checkpoint": path or "."}),
        client.post("/api/checkpoints/convert", json={"name": "x", "loras": [path]}),
        client.patch(f"/api/checkpoints/{quoted}", json={"name": path}),
    ]


@pytest.mark.parametrize("path", [*PATHS, *(pytest.param(path, marks=pytest.mark.slow) for path in MORE_PATHS)])
def test_no_field_is_a_path(served: Served, path: str) -> None:
    client, loaded = served.client, []
    quoted = httpx.URL("http://x/", params={"q": path}).query.decode().removeprefix("q=").replace("+", "%20")
    for place in (
        "jobs", "uploads", "pictures", "loras", "datasets", "runs", "pictures/{}/file", "loras/{}/file",
        "datasets/good/pictures", "datasets/{}/pictures/x.png", "datasets/good/pictures/{}/mask", "checkpoints",
        "checkpoints/{}/file", "tasks", "controls",
    ):  # fmt: skip
        url = f"/api/{place.format(quoted)}" if "{}" in place else f"/api/{place}/{quoted}"
        loaded.append(client.get(url))
        loaded.append(client.delete(url))
    loaded += [
        client.put(f"/api/datasets/{quoted}"),
        client.post("/api/loras", files={"file": (path or "x", b"x")}, data={"name": path}),
        client.post("/api/runs/plan", json={"name": "x", "dataset": path}),
        client.post("/api/runs", json={"name": path, "dataset": "good"}),
        client.post("/api/runs", json={"name": "x", "dataset": "good", "training_adapter": path}),
        client.post("/api/runs/plan", json={"name": "x", "dataset": "good", "init_lora": path}),
        client.post("/api/runs", json={"name": "x", "dataset": "good", "output": path}),
        client.post("/api/runs", json={"name": "x", "dataset": "good", "model_dir": path}),
        client.post("/api/runs", json={"name": "x", "dataset": "good", "validation": path}),
        client.post("/api/runs/plan", json={"name": "x", "dataset": "good", "regularization": path}),
        client.patch("/api/datasets/good/captions", json={path: "caption"}),
        *library_requests(client, path, quoted),
        *(
            client.post("/api/jobs", json={**SMALL, field: path})
            for field in ("init_image", "mask", "model_dir", "control")
        ),
        client.post("/api/jobs", json={**SMALL, "control": "x", "control_image": path}),
        client.post("/api/jobs", json={**SMALL, "loras": [{"name": path}]}),
        client.post("/v1/images/generations", json={**SMALL, "init_image": path}),
        client.post("/v1/images/generations", json={**SMALL, "loras": [path]}),
        client.post("/sdapi/v1/img2img", json={**SMALL, "init_images": [path]}),
    ]
    assert not [answer for answer in loaded if SECRET in answer.text]
    assert not [answer.text for answer in loaded if answer.status_code >= 500]
    home = served.studio.settings.folder.parent
    assert sorted(each.name for each in home.iterdir()) == [
        "secret", "secret.png", "secret.safetensors", "secret.txt", "studio"
    ]  # fmt: skip
    assert not [name for name in served.studio.datasets.names() if set(name) & set("/\\~:%")]


def test_a_link_is_no_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("outside.png", "folder/own.png"):
        (tmp_path / name).write_text(SECRET, encoding="utf-8")
    (tmp_path / "folder" / "link.png").symlink_to(tmp_path / "outside.png")
    assert file_in(tmp_path / "folder", "own.png", "picture", (".png",)) == tmp_path / "folder" / "own.png"
    with pytest.raises(UnknownError):
        file_in(tmp_path / "folder", "link.png", "picture", (".png",))


def test_a_picture_of_a_dataset_is_named_by_the_server(served: Served) -> None:
    for name in ("../../../evil.png", "..\\evil.png", "evil.php"):
        answer = served.client.post("/api/datasets/good/pictures", files={"file": (name, png())}, data={"caption": "x"})
        assert answer.status_code in (201, 400), answer.text
    folder = served.studio.settings.folder
    assert {path.name for path in folder.rglob("*evil*")} <= {"evil.png", "evil-2.png", "evil.txt", "evil-2.txt"}
    assert {path.parent.name for path in folder.rglob("*evil*")} == {"good"}


@pytest.mark.parametrize("host", ["evil.com", "evil.com:7860", "127.0.0.1.evil.com", "localhost@evil.com", "", "[::1"])
def test_a_foreign_host_is_refused(served: Served, host: str) -> None:
    got = raw(served, f"GET /api/model HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert got.split(b" ")[1] in (b"403", b"400") and b"size_multiple" not in got


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.com"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"},
        {"origin": "https://localhost"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
    ],
)  # fmt: skip
def test_another_sites_page_can_neither_post_nor_read(served: Served, headers: dict[str, str]) -> None:
    for answer in (
        served.client.post("/api/jobs", json=SMALL, headers=headers),
        served.client.get("/api/pictures", headers=headers),
        served.client.delete("/api/loras/x", headers=headers),
    ):
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_a_form_cannot_make_a_job(served: Served) -> None:
    """A form of another site can send text, and old browsers send no Origin."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = served.client.post("/api/jobs", content=json.dumps(SMALL), headers={"content-type": kind})
        assert answer.status_code == 400 and "must be JSON" in answer.text


def test_hosts_and_origins() -> None:
    local = Gate(ServeSettings())
    assert all(map(local.knows, ("127.0.0.1", "localhost:7860", "[::1]:7860", "127.9.9.9")))
    assert not any(map(local.knows, ("192.168.0.7", "studio.local", "localhost.evil.com", "a:b", "::1")))
    open_one = Gate(ServeSettings(host="0.0.0.0", api_key="k", allow_host=("Studio.local",)))
    assert all(map(open_one.knows, ("192.168.0.7:7860", "studio.local", "localhost"))) and not open_one.knows(
        "evil.com"
    )
    assert same_origin("http://127.0.0.1:7860", "127.0.0.1:7860") and not same_origin("http://127.0.0.1", "127.0.0.1:1")


def test_another_address_needs_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("ZIMAGE_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.0.7", "studio.local"):
        assert main(["serve", f"--host={host}", f"--folder={tmp_path / 'no'}"]) == 1
        assert "can be reached from other machines" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no").exists()


def test_the_key_is_asked_for_everywhere_and_never_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(tmp_path, api_key="Secret-Key-1") as served:
        client = served.client
        paths = ("/docs", "/openapi.json", "/api/model", "/v1/models", "/sdapi/v1/options", "/api/nothing")
        assert [client.get(path).status_code for path in paths] == [401] * len(paths)
        for headers in ({"authorization": "Bearer wrong"}, {"x-api-key": ""}, {"authorization": "Basic !"}):
            assert client.get("/api/model", headers=headers).status_code == 401
        for headers in ({"authorization": "Bearer Secret-Key-1"}, {"x-api-key": "Secret-Key-1"}):
            assert client.get("/api/model", headers=headers).status_code == 200
        assert client.get("/api/model", auth=("anybody", "Secret-Key-1")).status_code == 200
        assert client.post("/login", json={"key": "wrong"}).status_code == 401
        cookie = client.post("/login", json={"key": "Secret-Key-1"}).headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Secret-Key-1" not in cookie
        made = served.make(prompt="a very private prompt")  # by the cookie
        assert made["state"] == "done"
    assert "Secret-Key-1" not in caplog.text and "private prompt" not in caplog.text


def bomb() -> bytes:
    """A PNG whose header says 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.png", b"<html>" + SCRIPT.encode()), ("a.png", b""), ("a.png", png()[:40]), ("a.png", bomb()),
        ("a.png", b"GIF89a" + b"\0" * 50), ("a.png", b"%PDF-1.4"), ("a.svg", f"<svg>{SCRIPT}</svg>".encode()),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"\xff" * 100), ("a.tif", b"II*\0" + b"\0" * 50),
    ],
    ids=["html", "empty", "cut", "bomb", "gif", "pdf", "svg", "noise", "tiff"],
)  # fmt: skip
def test_a_lying_picture_is_refused(served: Served, name: str, data: bytes) -> None:
    file = {"file": (name, data, "image/png")}
    answers = [
        served.client.post("/api/uploads", files=file),
        served.client.post("/api/datasets/good/pictures", files=file),
        served.client.post("/v1/images/edits", files={"image": file["file"]}, data={"prompt": "x"}),
    ]
    assert [answer.status_code for answer in answers] == [400] * 3


def test_only_pixels_of_an_upload_are_kept(served: Served) -> None:
    data = png() + SCRIPT.encode()  # a picture and a page in one file
    id = served.client.post("/api/uploads", files={"file": ("a.html", data, "text/html")}).json()["id"]
    kept = served.client.get(f"/api/uploads/{id}")
    assert SCRIPT.encode() not in kept.content and kept.headers["x-content-type-options"] == "nosniff"


def test_a_lying_lora_is_refused_and_leaves_nothing(served: Served, tmp_path: Path) -> None:
    good = Errands(tmp_path).lora(tmp_path / "good.safetensors").read_bytes()
    client, before = served.client, sorted(served.studio.loras.folder.iterdir())
    for data in (b"", b"x" * 100, good[:-10], png(), struct.pack("<Q", 2**60) + b"{}"):
        answer = client.post("/api/loras", files={"file": ("bad.safetensors", data)})
        assert answer.status_code == 400, answer.text
        assert str(served.studio.settings.folder) not in answer.text
    assert sorted(served.studio.loras.folder.iterdir()) == before
    assert client.post("/api/loras", files={"file": ("good.safetensors", good)}).status_code == 201
    assert client.post("/api/loras", files={"file": ("good.safetensors", good)}).status_code == 409
    assert served.make(loras=[{"name": "good", "scale": 0.5}])["state"] == "done"
    assert client.get("/api/loras/good").json()["changes"] and client.get("/api/loras").json()[0]["problem"] is None
    assert client.delete("/api/loras/good").status_code == 204


def test_an_oversized_body_is_refused_before_it_is_read(served: Served) -> None:
    head = "POST /api/uploads HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    declared = raw(served, f"{head}Content-Length: 999999999\r\n\r\n".encode())
    assert declared.split(b" ")[1] == b"413"
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    endless = raw(
        served, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"5\r\n--x\r\n\r\n" + chunk * 20, wait=1
    )
    assert endless.split(b" ")[1] in (b"413", b"400")
    large = served.client.post("/api/uploads", files={"file": ("a.png", b"x" * 1_100_000)})
    assert large.status_code == 413
    pieces = (b" " * 65536 for _ in range(40))  # so that no length is declared
    assert served.client.post("/api/jobs", content=pieces, headers=JSON).status_code == 413
    twice = "GET /api/model HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.com\r\nConnection: close\r\n\r\n"
    assert raw(served, twice.encode()).split(b" ")[1] == b"400"


def test_script_stays_text(served: Served) -> None:
    client = served.client
    made = served.make(prompt=SCRIPT)
    client.post("/api/datasets/good/pictures", files={"file": ("a.png", png())}, data={"caption": SCRIPT})
    client.post("/api/jobs", json={**SMALL, SCRIPT: 1})
    pages = [
        client.get("/api/pictures"), client.get(f"/api/jobs/{made['id']}"), client.get("/api/datasets/good"),
        client.post("/api/jobs", json={SCRIPT: 1}), client.get(f"/api/loras/{SCRIPT}"), client.get("/docs"),
    ]  # fmt: skip
    for page in pages:
        kind = page.headers["content-type"]
        assert kind.startswith("application/json") or SCRIPT not in page.text
        assert "; script-src 'self';" in f"; {page.headers['content-security-policy']};"
        assert page.headers["x-content-type-options"] == "nosniff" and page.headers["x-frame-options"] == "DENY"
    picture = client.get(f"/api/pictures/{made['pictures'][0]}/file")
    assert picture.headers["content-type"] == "image/png"


def test_slow_and_half_closed_clients_hold_nobody_up(served: Served) -> None:
    port, held = served.server.port, []
    body = json.dumps({**SMALL, "steps": 100, "width": 64, "height": 64})
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    for i in range(40):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(head.encode()[: 20 + i] if i % 2 else f"{head}Content-Length: 500\r\n\r\n{{".encode())
        held.append(connection)
    began = time.monotonic()
    assert served.make()["state"] == "done" and time.monotonic() - began < 20
    half = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    raw(served, half, wait=0.5, half=True)  # sends all, then closes its side
    raw(served, half[:-5], wait=0.5, half=True)  # closes in the middle of its body
    for connection in held:
        connection.close()
    until = time.monotonic() + 20
    while served.client.get("/api/status").json()["running"]:
        assert time.monotonic() < until  # the job of the client that left has been cancelled
        time.sleep(0.05)
