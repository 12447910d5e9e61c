"""The command `zimage serve`: what it refuses before it listens, in one line."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from zimage_cli.app import main


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_without_its_packages_it_says_how_to_install_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", f"--folder={tmp_path / 'studio'}"]) == 1
    assert "zimage serve: pip install 'zimage-mlx[serve]'" in said(capsys)
    monkeypatch.delitem(sys.modules, "fastapi")
    monkeypatch.setitem(sys.modules, "mcp", None)
    assert main(["serve", "--mcp", f"--folder={tmp_path / 'studio'}"]) == 1
    assert "zimage serve --mcp: pip install 'zimage-mlx[mcp]'" in said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", f"--port={port}", f"--folder={tmp_path}"]) == 1
    assert f"127.0.0.1:{port}: cannot be listened on" in said(capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--queue-size=0"], "--queue-size 0 must be at least 1"),
        (["--port=70000"], "--port 70000 must be at most 65535"),
        (["--model-dir=absent"], "absent: is not a folder"),
        (["--idle-minutes=-1"], "--idle-minutes -1.0 must be at least 0"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", f"--folder={tmp_path / 'studio'}", *options]) == 1
    assert words in said(capsys)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert main(["serve", f"--folder={tmp_path / 'file'}"]) == 1
    assert "cannot be made" in said(capsys)
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "studio.db").write_text("no database, but long enough to be read as one" * 100, encoding="utf-8")
    assert main(["serve", f"--folder={folder}", "--port=0"]) == 1
    assert "cannot be used as the server's database" in said(capsys)
