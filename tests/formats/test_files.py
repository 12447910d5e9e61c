"""Files are written whole or not at all, whoever writes beside them; names are tried before the work."""

from __future__ import annotations

import os
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.leftovers import leave_half

from zimage_cli.app import main
from zimage_ref.checkpoints.hub import BUILT_IN
from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats import files, temporary
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.files import atomic_write, check_writable, sha256
from zimage_ref.formats.json_file import read_json
from zimage_ref.formats.reading import read_text
from zimage_ref.formats.temporary import remove_stale
from zimage_ref.options_file import read_options
from zimage_ref.training.config import TrainConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock, pipes or modes")
GENERATE = ("generate", "--model-dir", "tiny", "--prompt", "x", "--width", "64", "--height", "64", "--steps", "2")


def test_threads_that_write_one_file_never_mix(tmp_path: Path) -> None:
    path, faults = tmp_path / "c" / "entry", []

    def write(data: bytes) -> None:
        for _ in range(15):
            try:
                with atomic_write(path) as file:
                    for _ in range(4):
                        file.write(data)
                assert path.read_bytes() in (b"a" * 40_000, b"b" * 40_000)
            except (OSError, AssertionError) as error:
                faults.append(error)

    threads = [threading.Thread(target=write, args=(letter * 10_000,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and os.listdir(path.parent) == ["entry"]


def test_a_leftover_is_told_by_its_lock(tmp_path: Path) -> None:
    left, foreign = leave_half(tmp_path / "x.png"), tmp_path / ".x.png.4711.tmp"
    foreign.write_bytes(b"of another program")
    with atomic_write(tmp_path / "y.png") as file:
        file.write(b"whole")
        remove_stale(tmp_path)
        assert not left.exists() and len(list(tmp_path.glob(".y.png.*"))) == 1
    assert sorted(os.listdir(tmp_path)) == [foreign.name, "y.png"]


def test_a_new_folder_is_locked_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program sweeps between the folder's creation and its lock: a second folder is made then."""
    opened = os.open

    def sweep_first(path: Path, flags: int) -> int:
        monkeypatch.setattr(os, "open", opened)
        remove_stale(tmp_path)
        return opened(path, flags)

    monkeypatch.setattr(os, "open", sweep_first)
    with temporary.locked_folder(tmp_path / "names") as folder:
        remove_stale(tmp_path)
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_programs_that_try_names_in_one_folder_leave_each_other_alone(tmp_path: Path) -> None:
    def try_names(number: int) -> None:
        for _ in range(100):
            check_writable(tmp_path / f"{number}.npz")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(try_names, range(4)))
    assert not list(tmp_path.iterdir())


def test_a_leftover_stays_on_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    left = leave_half(tmp_path / "x.png")
    monkeypatch.setattr(temporary.fcntl, "flock", without)
    remove_stale(tmp_path)
    with atomic_write(tmp_path / "x.png") as file:
        file.write(b"whole")
    assert left.exists() and (tmp_path / "x.png").read_bytes() == b"whole"


@pytest.mark.parametrize("command", ["generate", "convert", "convert a LoRA", "doctor"])
def test_a_command_sweeps_the_folder_that_it_writes_to(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave_half(tmp_path / "earlier.png")
    if command == "generate":
        assert main([*GENERATE, "--steps", "1", "--no-thumbnail", "--output", str(tmp_path / "x.png")]) == 0
    elif command == "convert":
        source = ["--model-type", "ae", "--input", str(BUILT_IN), "--output", str(tmp_path / "x.npz")]
        assert main(["convert", *source]) == 0
    elif command == "convert a LoRA":
        assert main(["convert", "--model-type", "lora", "--input", "x", "--output", str(tmp_path / "x.npz")]) == 1
    else:
        monkeypatch.setattr("zimage_cli.commands.doctor.require_mlx", lambda _: pytest.fail("too far"))
        with pytest.raises(pytest.fail.Exception):
            main(["doctor", "--json", str(tmp_path / "x.json")])
    assert not left.exists()


def test_a_name_as_long_as_the_disk_allows_is_written(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".png", "ü" * 125 + ".png"):
        check_writable(tmp_path / name)
        with atomic_write(tmp_path / name) as file:
            file.write(b"1")
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("name", ["x" * 256, "new/" + "ü" * 128, "new/deep/" + "y" * 300 + "/z"])
def test_a_name_that_is_too_long_is_found_before_the_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        check_writable(tmp_path / "fine", tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_trying_a_name_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine", encoding="utf-8")
    (tmp_path / "in").mkdir()
    before = (tmp_path / "x").stat()
    check_writable(tmp_path / "x", tmp_path / "new" / ".." / "x", tmp_path / "in" / ".." / "x", tmp_path / "a" / "b")
    assert (tmp_path / "x").stat() == before and sorted(os.listdir(tmp_path)) == ["in", "x"]


@pytest.mark.parametrize(
    ("blocked", "argv"),
    [
        ("x.preview.png", [*GENERATE, "--preview-steps", "1", "--output", "x.png"]),
        ("x.lora.json", ["convert", "--model-type", "lora", "--input", "y", "--output", "x.npz", "--naming", "burn"]),
        (
            "x-00001-of-00001.safetensors",
            ["convert", "--model-type", "ae", "--input", "y", "--output", "x.safetensors", "--max-shard-size", "1GB"],
        ),
        ("zimage-demo/zorp.safetensors", ["demo"]),
        ("zimage-demo/dataset/zorp3.txt", ["demo"]),
    ],
)
def test_every_name_of_a_command_is_tried_before_the_work(
    blocked: str,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / blocked).mkdir(parents=True)
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert f"{blocked}: is a folder: name a file" in err.replace("\n", "") and "encode" not in err


def test_links_are_written_through_and_stay(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_bytes(b"old")
    for name, target in (("link", "disk/real"), ("dangling", "disk/new"), ("far", "link")):
        (tmp_path / name).symlink_to(target)
        check_writable(tmp_path / name)
        with atomic_write(tmp_path / name) as file:
            file.write(name.encode())
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_bytes() == name.encode()
    assert (tmp_path / "disk" / "real").read_bytes() == b"far"
    assert sorted(os.listdir(tmp_path / "disk")) == ["new", "real"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "null"):
        with pytest.raises(ConfigError, match=f"{name}: is a pipe, a socket or a device: name a file"):
            check_writable(tmp_path / name)
    with pytest.raises(ConfigError, match="loop: cannot be written: Too many levels"):
        check_writable(tmp_path / "loop")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        files, "create_locked", lambda path: (tmp_path / "t", os.open("/dev/full", os.O_RDWR)), raising=True
    )
    for size in (1, 5_000_000):  # written at the end, and under way
        with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "x") as file:
            file.write(b"1" * size)
        assert caught.value.filename == str(tmp_path / "x")


def test_a_full_disk_is_one_line_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(files, "FULL_SYNC", None)
    out = tmp_path / "x.npz"
    assert main(["convert", "--model-type", "ae", "--input", str(BUILT_IN), "--output", str(out)]) == 1
    err = capsys.readouterr().err.replace("\n", " ")
    assert "x.npz: the disk is full: make room and start again" in err and os.listdir(tmp_path) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_says_its_encoding_by_its_mark(encoding: str, tmp_path: Path) -> None:
    for name, text in (
        ("a.txt", "Füchse\r\nim Schnee"),
        ("b.toml", "trigger = 'ü'\r\nrank = 2\n"),
        ("c.json", '{"é": 1}'),
    ):
        (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "a.txt") == "Füchse\nim Schnee"
    assert read_options(tmp_path / "b.toml", TrainConfig) == {"trigger": "ü", "rank": 2}
    assert read_json(tmp_path / "c.json") == {"é": 1}


def test_a_pipe_or_a_device_is_refused_where_a_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.json", tmp_path / "endless.json"):
        for read in (Checkpoint.open, read_json, sha256):
            with pytest.raises(FormatError, match=r"json: cannot be .*is a pipe, a socket or a device, not a file"):
                read(path)
        with pytest.raises(ConfigError, match="is a pipe"):
            read_options(path, TrainConfig)


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", "--input", "pipe"],
        ["inspect", "--input", "pipe.png"],
        ["convert", "--model-type", "lora", "--output", "x.safetensors", "--input", "pipe"],
        ["convert", "--model-type", "ae", "--output", "x.npz", "--input", "pipe"],
        [*GENERATE, "--output", "x.png", "--lora", "pipe"],
        [*GENERATE, "--output", "x.png", "--init-image", "pipe.png"],
        [*GENERATE, "--output", "x.png", "--vae", "pipe"],
        ["generate", "--model-dir", "tiny", "--from-image", "pipe.png"],
        ["generate", "--model-dir", "tiny", "--prompt-file", "pipe"],
        ["train", "--config", "pipe.toml"],
    ],
    ids=" ".join,
)
def test_a_command_does_not_wait_for_a_pipe(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pipe", "pipe.png", "pipe.toml"):
        os.mkfifo(name)
    assert main(argv) == 1
    assert "is a pipe, a socket or a device, not a file" in " ".join(capsys.readouterr().err.split())
