"""Facts about this machine that need no MLX: system, chip, memory, power, disk; and what to do about bad ones.

Nothing here tells who owns the machine: no name of a user or a host, no path.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from zimage_ref.formats.files import sync
from zimage_ref.memory import physical_memory

from .findings import Machine, Problem

with suppress(ImportError):
    import fcntl  # Windows has none

MODEL_BYTES = 33_000_000_000  # of a download of Z-Image-Turbo, and as much room for nothing else
_OLDEST_MACOS = 14
_NO_CACHE = 48  # fcntl's F_NOCACHE on macOS
_CHUNK = 1 << 24  # bytes written and read at a time
_PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda", "mlx-cuda-12", "mlx-cuda-13", "numpy")


def describe() -> Machine:
    """The machine, its system and the software that matters."""
    machine = hardware() + _software()
    return machine + _mac() if sys.platform == "darwin" else machine


def hardware() -> Machine:
    """The machine and its system, without its software."""
    return _system() + _memory()


def ask(*command: str) -> str:
    """The output of a command of the system. It is empty if the command fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


def _system() -> Machine:
    facts: dict[str, str | int | float] = {
        "system": platform.system(), "release": platform.mac_ver()[0] or platform.release(),
        "architecture": platform.machine(), "python": platform.python_version(), "chip": _chip(),
        "cores": os.cpu_count() or 0,
    }  # fmt: skip
    return Machine(facts, [])


def _chip() -> str:
    if sys.platform == "darwin":
        return ask("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _memory() -> Machine:
    total = physical_memory()
    return Machine({"memory": total} if total else {}, [])


def _software() -> Machine:
    """Versions of MLX's packages, and for which system the installed one was built."""
    facts: dict[str, str | int | float] = {}
    for name in _PACKAGES:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        facts[name] = found.version
        if tags := re.findall(r"^Tag: (.*)$", found.read_text("WHEEL") or "", re.MULTILINE):
            facts[f"{name} built for"] = tags[0]
        if name == "mlx":
            facts["mlx from"] = "a folder or an address" if found.read_text("direct_url.json") else "a package index"
    return Machine(facts, [])


def _mac() -> Machine:
    facts: dict[str, str | int | float] = {}
    problems = []
    if platform.machine() == "x86_64":
        remedy = "install a Python for Apple Silicon, such as the one of python.org or Homebrew in /opt/homebrew"
        emulated = ask("sysctl", "-n", "sysctl.proc_translated") == "1"
        fact = "this Python is an x86_64 one, under Rosetta" if emulated else "this Mac has an Intel processor"
        problems.append(Problem(fact, remedy if emulated else "MLX needs Apple Silicon: take another Mac", grave=True))
    release = platform.mac_ver()[0]
    if release and int(release.split(".")[0]) < _OLDEST_MACOS:
        problems.append(Problem(f"macOS {release} is too old for MLX", "update to macOS 14 or later", grave=True))
    if limit := ask("sysctl", "-n", "iogpu.wired_limit_mb"):
        facts["iogpu.wired_limit_mb"] = int(limit)
    if cores := re.search(r'"gpu-core-count" ?= ?(\d+)', ask("ioreg", "-rc", "AGXAccelerator", "-d1")):
        facts["GPU cores"] = int(cores[1])
    return Machine(facts, problems) + power(ask("pmset", "-g"), ask("pmset", "-g", "batt"))


def power(settings: str, battery: str) -> Machine:
    """The settings for sleep and power that `pmset -g` and `pmset -g batt` print."""
    facts: dict[str, str | int | float] = {}
    problems = []
    said = dict(re.findall(r"^\s*(\w+)\s+(\d+)", settings, re.MULTILINE))
    for name in ("sleep", "displaysleep", "lowpowermode", "powermode"):
        if name in said:
            facts[name] = int(said[name])
    if "Battery Power" in battery:
        facts["power"] = "battery"
        problems.append(Problem("the Mac runs on its battery", "connect its power supply before you train"))
    elif battery:
        facts["power"] = "mains"
    if said.get("lowpowermode") == "1" or said.get("powermode") == "1":
        problems.append(Problem("Low Power Mode is on, so the GPU is slow", "sudo pmset -a lowpowermode 0"))
    if int(said.get("sleep", 0)) > 0:
        fact = f"the Mac goes to sleep after {said['sleep']} idle minutes"
        problems.append(Problem(fact, "keep it awake while you train: caffeinate -i zimage train ..."))
    return Machine(facts, problems)


def disk(megabytes: int, folder: Path = Path()) -> Machine:
    """Free space of the disk that `folder` is on, and how fast it reads a file of `megabytes`, made for this.

    The file has no name, or one for a moment. The system is asked to forget it before it is read again.
    """
    free = shutil.disk_usage(folder).free
    facts: dict[str, str | int | float] = {"disk free": free}
    problems = []
    if free < MODEL_BYTES:
        fact = f"the disk has {free / 1e9:.0f} GB free"
        problems.append(Problem(fact, "a download of the model takes 33 GB: make room, or convert one on another disk"))
    if free > 4 * megabytes * 1e6:
        with suppress(OSError):  # a folder that may not be written: the doctor does without
            facts["disk read"] = _read_speed(folder, megabytes)
    return Machine(facts, problems)


def _read_speed(folder: Path, megabytes: int) -> float:
    """Bytes a second."""
    chunk = os.urandom(_CHUNK)
    count = max(1, megabytes * 1_000_000 // _CHUNK)
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(count):
            file.write(chunk)
        file.flush()
        sync(file.fileno())
        forget(file.fileno())
        file.seek(0)
        start = time.perf_counter()
        while file.read(_CHUNK):
            pass
        return count * _CHUNK / (time.perf_counter() - start)


def forget(descriptor: int) -> None:
    """Asks the system to read an open file from the disk, not from memory."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, _NO_CACHE, 1)
    elif hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
