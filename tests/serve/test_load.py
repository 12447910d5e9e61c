"""Load: 100 clients at once, thousands of requests, the time that the server adds, and a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.serving import SMALL, serving

from zimage_cli.app import main

pytestmark = pytest.mark.slow
CLIENTS, REQUESTS = 100, 2000
FLAT, ADDED, ADDED_SECONDS, FIRST_EVENT = 0.03, 0.05, 0.03, 0.05


def test_a_hundred_clients_at_once(tmp_path: Path) -> None:
    """Nothing but 202 and 429; all accepted jobs end; every picture is the file that `zimage generate` writes."""
    with serving(tmp_path / "studio", queue_size=40) as served:
        answers: Counter[int] = Counter()
        jobs: dict[int, str] = {}

        def client(number: int) -> None:
            with httpx.Client(base_url=served.url, timeout=120, trust_env=False) as http:
                while True:
                    headers = {"x-client": str(number)}
                    answer = http.post("/api/jobs", json={**SMALL, "seed": number}, headers=headers)
                    answers[answer.status_code] += 1
                    if answer.status_code == 202:
                        jobs[number] = answer.json()["id"]
                        break
                    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
                    time.sleep(int(answer.headers["retry-after"]))

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        ends = {number: served.wait(id, 300) for number, id in jobs.items()}
        assert answers.keys() == {202, 429} and answers[202] == CLIENTS
        assert {end["state"] for end in ends.values()} == {"done"}
        argv = ["generate", "--model-dir=tiny", "--prompt=a red star", "--count=100", "--width=32", "--height=32"]
        argv += ["--steps=2", "--guidance=0", f"--output={tmp_path}/{{seed}}.png", "--no-thumbnail"]
        assert main(argv) == 0
        for number, end in ends.items():
            made = served.client.get(f"/api/pictures/{end['pictures'][0]}/file").content
            assert made == (tmp_path / f"{number}.png").read_bytes(), number


def started(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address."""
    argv = [sys.executable, "-m", "zimage_cli", "serve", "--port=0", f"--folder={folder}", "--memory=fast"]
    environment = {**os.environ, "COLUMNS": "200"}
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    for line in process.stderr:
        if "serving" in line:
            return process, line.split()[1]
    raise AssertionError("the server did not start")


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/images/generations", json={**SMALL, "response_format": "url", **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc, which only Linux has")
def test_memory_stays_flat_over_thousands_of_requests(tmp_path: Path) -> None:
    process, url = started(tmp_path)
    try:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            held = []
            for number in range(REQUESTS):
                make(client, seed=number, steps=1, prompt=f"a red star {number}", width=16, height=16)
                held.append(resident(process))
        tenth = REQUESTS // 10
        second, last = sum(held[tenth : 2 * tenth]) / tenth, sum(held[-tenth:]) / tenth
        sys.stdout.write(f"second tenth {second / 1e6:.1f} MB, last tenth {last / 1e6:.1f} MB\n")
        assert last <= second * (1 + FLAT)
    finally:
        process.terminate()
        process.communicate(timeout=60)


ALONE = """
import json, sys, time
from zimage_cli.commands.serve import engines_of
from zimage_cli.terminal.backends import DEFAULT
from zimage_ref import GenerateConfig
from zimage_ref.generation.provenance import ModelChoice
from zimage_ref.generation.run import GenerationRun, RunSettings
from zimage_ref.pictures.images import save_picture
from pathlib import Path
run = GenerationRun(engines_of(DEFAULT, ModelChoice("tiny")).open(), RunSettings(memory="fast"))
for line in sys.stdin:
    began = time.perf_counter()
    for made in run.make(run.plan([GenerateConfig(**json.loads(line))])):
        save_picture(made.picture, Path(sys.argv[1]), made.record)
    print(time.perf_counter() - began, flush=True)
"""


def test_the_server_adds_little_time(tmp_path: Path) -> None:
    """To a picture, in turns with the same run without a server. The best of each counts: others use the machine."""
    picture = {**SMALL, "width": 128, "height": 128, "steps": 8}
    argv = [sys.executable, "-c", ALONE, str(tmp_path / "alone.png")]
    alone = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process, url = started(tmp_path)
    without, served, waits = [], [], []
    try:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            for seed in range(25):
                assert alone.stdin and alone.stdout
                alone.stdin.write(json.dumps({**picture, "seed": seed}) + "\n")
                alone.stdin.flush()
                without.append(float(alone.stdout.readline()))
                began = time.perf_counter()
                make(client, **picture, seed=seed)
                served.append(time.perf_counter() - began)
                waits.append(first_event(client))
    finally:
        for each in (process, alone):
            each.terminate()
            each.communicate(timeout=60)
    added, first = min(served) - min(without), sorted(waits)[len(waits) // 2]
    sys.stdout.write(f"alone {min(without):.3f} s, added {added * 1000:.0f} ms, first event {first * 1000:.0f} ms\n")
    assert added < max(ADDED * min(without), ADDED_SECONDS)
    assert first < FIRST_EVENT


def first_event(client: httpx.Client) -> float:
    """Seconds from the request for a picture to its first event."""
    began = time.perf_counter()
    id = client.post("/api/jobs", json=SMALL).json()["id"]
    with client.stream("GET", f"/api/jobs/{id}/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        seconds = time.perf_counter() - began
        list(lines)
    return seconds


def test_a_kill_loses_nothing_that_was_reported(tmp_path: Path) -> None:
    process, url = started(tmp_path)
    done: list[str] = []

    def client(number: int) -> None:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            try:
                for i in range(1000):
                    made = make(http, seed=number * 1000 + i)
                    done.append(made["data"][0]["url"].split("/")[-2])
            except httpx.TransportError:
                return

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(client, number) for number in range(8)]
        while len(done) < 40:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        [each.result() for each in running]
    assert sqlite3.connect(tmp_path / "studio.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)
    process, url = started(tmp_path)
    try:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            for id in done:
                answer = http.get(f"/api/pictures/{id}/file")
                assert answer.status_code == 200 and http.get(f"/api/pictures/{id}").json()["record"]["seed"] >= 0
            states = {job["state"] for job in http.get("/api/jobs?limit=200").json()}
            assert states <= {"done", "failed", "cancelled"}
            assert make(http)["data"]
        for path in (tmp_path / "pictures").glob("*.png"):
            Image.open(path).load()
    finally:
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        process.communicate(timeout=60)
