"""Only the formats that the program reads are parsed, and every error of Pillow is one line."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from zimage_cli.app import main
from zimage_ref import DatasetError, FormatError, ZImageError
from zimage_ref.options import path_and_scale
from zimage_ref.pictures.files import opened
from zimage_ref.pictures.images import encoded, read_given, read_picture, save_picture
from zimage_ref.pictures.metadata import read_record
from zimage_ref.pictures.reading import decode

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n" + b"0 0 moveto 64 64 lineto stroke\n" * 20
ERRORS = (
    MemoryError(),
    IndexError("x"),
    KeyError(3),
    struct.error("short"),
    zlib.error("bad"),
    EOFError(),
    RuntimeError("two\nlines"),
)


def of_format(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").convert("P" if name == "PCX" else "RGB").save(buffer, name)
    return buffer.getvalue()


FOREIGN = {
    "eps": EPS,
    "ppm": of_format("PPM"),
    "tga": of_format("TGA"),
    "icns": of_format("ICNS"),
    "pcx": of_format("PCX"),
    "empty": b"",
}


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there after somebody has started Ghostscript."""
    ran, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return ran


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_content_decides_whether_a_file_is_a_picture(
    tmp_path: Path, ghostscript: Path, kind: str, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(FOREIGN[kind])
    for read, error in ((read_picture, DatasetError), (read_given, DatasetError), (read_record, FormatError)):
        with pytest.raises(error, match="cannot be read as a picture"):
            read(path)
    assert not ghostscript.exists()


def test_no_command_parses_other_formats(tmp_path: Path, ghostscript: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(EPS)
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    generate = ["generate", "--model-dir=tiny", "--prompt=x"]
    for argv in (
        [*generate, f"--init-image={path}"],
        [*generate, f"--init-image={tmp_path / 'b.png'}", f"--mask={path}"],
        ["generate", f"--from-image={path}"],
        ["inspect", f"--input={path}"],
    ):
        assert main(argv) == 1
        assert f"{path}: cannot be read as a picture" in capfd.readouterr().err
    assert not ghostscript.exists()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_of_pillow_is_one_line(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_picture(Image.new("RGB", (32, 32)), path)

    def fail(*args: object, **options: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        with pytest.raises(FormatError, match="32 x 32 cannot be written as PNG: .") as caught:
            encoded(Image.new("RGB", (32, 32)), "PNG")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(DatasetError, match=r"a\.png: cannot be read as a picture: .") as read:
        read_picture(path)
    assert "\n" not in str(read.value)


def test_a_picture_too_large_for_its_format_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="20000 x 1 cannot be written as WEBP"):
        save_picture(Image.new("RGB", (20_000, 1)), tmp_path / "a.webp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["a\0b.png", "\ud800.png", "", "/dev/null/x.png"])
def test_a_path_that_cannot_be_opened_is_one_line(path: str) -> None:
    with pytest.raises(ZImageError), opened(Path(path)):
        pass


def test_a_record_keeps_paths_that_are_not_unicode(tmp_path: Path) -> None:
    record = {
        "prompt": "é狐",
        "model": "m",
        "init_image": "tea\udce9.png",
        "loras": [{"file": "\udcff.st", "scale": 1}],
    }
    for suffix in (".png", ".jpg", ".webp"):
        save_picture(Image.new("RGB", (32, 32)), tmp_path / f"a{suffix}", record)
        assert read_record(tmp_path / f"a{suffix}") == record


@pytest.mark.parametrize(("form", "told"), [("MPO", False), ("TIFF", True)])
def test_pictures_behind_the_first_are_named_unless_they_belong_to_a_photograph(
    form: str, told: bool, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.jpg", form, save_all=True, append_images=frames[1:])
    decoded = decode((tmp_path / "x.jpg").read_bytes(), tmp_path / "x.jpg")
    assert any("holds 2 pictures" in remark for remark in decoded.remarks) == told


def test_a_file_with_a_colon_in_its_name_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_and_scale("a:0.5") == (Path("a"), 0.5)
    Path("a:0.5").touch()
    assert path_and_scale("a:0.5") == (Path("a:0.5"), 1.0)
