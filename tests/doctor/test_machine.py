"""Facts about the machine: what the system's tools say, problems with remedies, nothing personal."""

from __future__ import annotations

import getpass
import json
import platform
import socket
from pathlib import Path

import pytest

from zimage_ref.doctor import machine
from zimage_ref.doctor.findings import Findings, Machine, Problem, Verdict

PMSET = """System-wide power settings:
Currently in use:
 lowpowermode         1
 sleep                10 (sleep prevented by powerd)
 displaysleep         5
"""


def test_power_and_sleep_of_a_mac() -> None:
    found = machine.power(PMSET, "Now drawing from 'Battery Power'\n -InternalBattery-0 80%; discharging")
    assert found.facts == {"sleep": 10, "displaysleep": 5, "lowpowermode": 1, "power": "battery"}
    remedies = {problem.fact: problem.remedy for problem in found.problems}
    assert len(remedies) == 3 and "lowpowermode 0" in remedies["Low Power Mode is on, so the GPU is slow"]
    assert "caffeinate" in remedies["the Mac goes to sleep after 10 idle minutes"]
    assert not any(problem.grave for problem in found.problems)


def test_a_desktop_that_stays_awake_has_no_problem() -> None:
    found = machine.power(" sleep 0\n displaysleep 10\n", "Now drawing from 'AC Power'")
    assert found.problems == [] and found.facts["power"] == "mains"
    assert machine.power("", "") == Machine({}, [])


def mac(monkeypatch: pytest.MonkeyPatch, release: str, architecture: str, said: dict[str, str]) -> Machine:
    """What a Mac would say of which the tools say `said`."""
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), architecture))
    monkeypatch.setattr(machine, "ask", lambda *command: said.get(command[-1], ""))
    return machine.describe()


def test_rosetta_an_intel_mac_and_an_old_system_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = mac(monkeypatch, "13.6", "x86_64", {"sysctl.proc_translated": "1"})
    facts = [problem.fact for problem in emulated.problems if problem.grave]
    assert facts == ["this Python is an x86_64 one, under Rosetta", "macOS 13.6 is too old for MLX"]
    intel = mac(monkeypatch, "15.1", "x86_64", {})
    assert [problem.fact for problem in intel.problems] == ["this Mac has an Intel processor"]


def test_a_good_mac_has_facts_and_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"machdep.cpu.brand_string": "Apple M3 Pro", "iogpu.wired_limit_mb": "0", "-d1": '"gpu-core-count" = 14'}
    found = mac(monkeypatch, "15.2", "arm64", said)
    assert found.problems == []
    assert found.facts["chip"] == "Apple M3 Pro" and found.facts["GPU cores"] == 14
    assert found.facts["iogpu.wired_limit_mb"] == 0


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = machine.disk(1, tmp_path)
    assert found.facts["disk read"] > 1e6 and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_problem_and_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1_000_000_000}))
    found = machine.disk(512, tmp_path)
    assert "disk read" not in found.facts and found.problems[0].fact == "the disk has 1 GB free"


def test_a_command_that_is_not_there_says_nothing() -> None:
    assert machine.ask("no-such-command-here") == ""


def test_no_fact_is_personal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = machine.describe() + machine.disk(1)
    text = json.dumps(Findings(True, found).to_json())
    personal = {getpass.getuser(), socket.gethostname(), str(Path.home()), str(tmp_path), tmp_path.name}
    assert [word for word in personal if word in text and word != "root"] == []
    assert not [value for value in found.facts.values() if isinstance(value, str) and value.startswith(("/", "~"))]


def verdict(error: float) -> Verdict:
    return Verdict("product", "bf16", "1 x 1", error, 1e-3, error, 1e-2, 0.1)


def test_findings_are_healthy_unless_something_makes_results_useless() -> None:
    slow, grave = Problem("slow", "wait"), Problem("no MLX", "", grave=True)
    assert Findings(True, Machine({}, [slow]), [verdict(1e-4)]).healthy
    assert not Findings(True, Machine({}, [grave]), [verdict(1e-4)]).healthy
    assert not Findings(True, Machine({}, []), [verdict(1e-4), verdict(2e-3)]).healthy
    assert Findings(True, Machine({}, []), [verdict(float("nan"))]).wrong


def test_json_has_no_number_that_is_none() -> None:
    found = Findings(False, Machine({}, []), [verdict(float("inf")), verdict(float("nan")), verdict(1e-4)])
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [each["verdict"] for each in data["right"]] == ["wrong", "wrong", "right"]
    assert data["format"] == 1 and data["healthy"] is False
    assert set(data) == {
        "format", "zimage", "quick", "healthy", "seconds", "machine", "problems", "right", "fast", "measured",
        "predicted",
    }  # fmt: skip
