"""The command line on a Mac: it stays awake, and says what a Mac lacks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.networks import mlx_only

from zimage_cli.app import main
from zimage_cli.terminal import awake, backends
from zimage_ref import BackendError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The processes that are started."""
    found: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: found.append(command))
    return found


@mlx_only
@pytest.mark.parametrize(
    ("system", "options", "kept"),
    [("darwin", [], True), ("darwin", ["--no-caffeinate"], False), ("linux", [], False)],
)
def test_training_keeps_a_mac_awake(
    system: str, options: list[str], kept: bool, started: list[list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(awake.sys, "platform", system)
    nothing = ["--model-dir", str(tmp_path), "--dataset", str(tmp_path), "--output", str(tmp_path / "l.safetensors")]
    assert main(["train", *nothing, *options]) == 1
    assert started == [["caffeinate", "-i", "-w", str(os.getpid())]] * kept


def test_a_mac_without_caffeinate_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(awake.sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "Popen", missing)
    awake.keep_awake()


@pytest.mark.parametrize(
    ("machine", "macos", "words"),
    [
        ("x86_64", "15.1", "a native arm64 Python, and this Python is of x86_64"),
        ("arm64", "13.6.1", "it needs macOS 14, and this is 13.6.1: update macOS"),
        ("arm64", "15.1", "pip install zimage-mlx once more"),
    ],
)
def test_a_mac_that_cannot_run_mlx_is_told_why(
    machine: str, macos: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "DEFAULT", "numpy")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), machine))
    with pytest.raises(BackendError, match="training needs MLX, which is not installed: ") as caught:
        backends.require_mlx("training")
    assert words in str(caught.value)
