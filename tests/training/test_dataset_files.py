"""Every file of a dataset's folder is used, or named with the reason."""

from __future__ import annotations

import io
import json
import os
import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo
from support import tiny
from support.training_runs import pictures

from zimage_ref import DatasetError, FormatError
from zimage_ref.pictures.files import missing_reader
from zimage_ref.pictures.images import black_and_white, read_given
from zimage_ref.pictures.reading import decode
from zimage_ref.training.dataset import Example, list_dataset


def listed(folder: Path, trigger: str = "") -> tuple[dict[str, str], str]:
    """Captions by the name of their picture, and the notices."""
    notices: list[str] = []
    found = list_dataset(folder, trigger, notices.append)
    return {path.relative_to(folder).as_posix(): caption for path, caption in found}, "\n".join(notices)


def test_pictures_of_every_format_are_read_upright(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    missing_reader("HEIF")  # registers the reader and writer of HEIC
    for suffix, format in (("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF"), ("jfif", "JPEG"), ("HEIC", "HEIF")):
        tiny.photograph(40, 24, seed=1).save(data / f"{suffix}.{suffix}", format)
        (data / f"{suffix}.txt").write_text("a fox", encoding="utf-8")
    if features.check("avif"):
        tiny.photograph(40, 24, seed=1).save(data / "avif.avif")
        (data / "avif.txt").write_text("a fox", encoding="utf-8")
    found, notices = listed(data)
    assert len(found) == 5 + features.check("avif") and notices == ""
    expected = np.asarray(tiny.photograph(40, 24, seed=1), float)
    for name in found:
        example = Example.open(data / name, "")
        assert example.size == (40, 24)
        assert np.abs((example.pixels(40, 24).transpose(1, 2, 0) + 1) * 127.5 - expected).mean() < 9, name


@pytest.mark.parametrize(("format", "suffix", "way"), [("HEIF", "heic", r"pip install 'zimage-mlx\[heif\]'"),
                                                     ("AVIF", "avif", "pip install -U pillow")])  # fmt: skip
def test_a_format_that_cannot_be_read_here_is_named_with_the_way_out(
    format: str, suffix: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(features, "check", lambda name: False)
    missing_reader.cache_clear()
    try:
        data = pictures(tmp_path / "data", (20, 20))
        (data / f"IMG.{suffix}").write_bytes(b"x")
        (data / "captions.json").write_text(json.dumps({"p0000.png": "a", f"IMG.{suffix}": "b"}), encoding="utf-8")
        found, notices = listed(data)
        assert found == {"p0000.png": "a"}
        assert f"left out 1 ({missing_reader(format)}): IMG.{suffix}" in notices
        with pytest.raises(DatasetError, match=f"holds no pictures .*{way}"):
            (data / "p0000.png").unlink()
            list_dataset(data)
    finally:
        missing_reader.cache_clear()


def test_what_is_not_used_is_named_once_for_each_reason(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (20, 20))
    (data / ".hidden").mkdir()
    (data / "my.run").mkdir()
    (data / "sub").mkdir()
    for name in ("a.mp4", "sub/b.psd", "lone.txt", ".hidden/c.png", "my.run/d.png", ".DS_Store", "._p0000.png",
                 "sub/metadata.jsonl"):  # fmt: skip
        (data / name).write_bytes(b"x")
    (data / "gone.png").symlink_to("nowhere.png")
    found, notices = listed(data)
    assert found == {"p0000.png": "picture 0"}
    assert sorted(notices.splitlines()) == sorted(
        f"{data}: left out {text}"
        for text in (
            "1 (hidden): .hidden",
            "1 (the folder of a run): my.run",
            "3 (neither a picture nor a caption): a.mp4, sub/b.psd, sub/metadata.jsonl",
            "1 (a caption without a picture that is read): lone.txt",
            "1 (links to nothing): gone.png",
        )
    )
    (data / "captions.json").write_text('{"p0000.png": "from the list"}', encoding="utf-8")
    found, notices = listed(data)
    assert found == {"p0000.png": "from the list"}
    assert "left out 2 (captions are read from captions.json): lone.txt, p0000.txt" in notices


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mkfifo")
def test_a_pipe_among_the_pictures_is_named(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (20, 20))
    os.mkfifo(data / "x.png")
    assert "left out 1 (a pipe, a socket or a device): x.png" in listed(data)[1]
    with pytest.raises(DatasetError, match=r"x\.png: cannot be read as a picture: is a pipe"):
        Example.open(data / "x.png", "")


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (20, 20))
    pictures(tmp_path / "elsewhere", (20, 20))
    pictures(data / "own", (20, 20))
    for link, target in (("again", "own"), ("far", "../elsewhere"), ("far2", "../elsewhere"), ("own/up", "..")):
        (data / link).symlink_to(target, target_is_directory=True)
    found, notices = listed(data)
    assert sorted(found) == ["far/p0000.png", "own/p0000.png", "p0000.png"]
    assert "left out 3 (a folder that is read already): again, far2, own/up" in notices


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", ["txt", "TXT", "metadata.jsonl", "captions.json"])
def test_names_are_the_same_composed_or_not(kind: str, written: str, on_disk: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    name = unicodedata.normalize(on_disk, "café.png")
    tiny.photograph(20, 20, seed=1).save(data / name)
    given = unicodedata.normalize(written, "café.png")
    if kind.lower() == "txt":
        (data / f"{given.removesuffix('.png')}.{kind}").write_text("tea", encoding="utf-8")
    elif kind == "captions.json":
        (data / kind).write_text(json.dumps({given: "tea"}), encoding="utf-8")
    else:
        (data / kind).write_text(json.dumps({"file_name": given, "text": "tea"}), encoding="utf-8")
    assert listed(data) == ({name: "tea"}, "")


@pytest.mark.parametrize("given", ["./sub/p0000.png", "sub\\p0000.png", ".\\sub\\p0000.png", "sub//x/../p0000.png"])
def test_names_in_a_list_may_be_written_as_other_systems_do(given: str, tmp_path: Path) -> None:
    data = pictures(tmp_path / "data" / "sub", (20, 20)).parent
    (data / "sub" / "p0000.txt").unlink()
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": given, "text": "a fox"}), encoding="utf-16")
    assert listed(data) == ({"sub/p0000.png": "a fox"}, "")


def test_a_picture_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (20, 20))
    for text, fact in (
        ('{"p0000.png": "a", "./p0000.png": "b"}', "names p0000.png a second time, as ./p0000.png"),
        ('{"p0000.png": "a", "p0000.png": "b"}', "p0000.png is there twice"),
    ):
        (data / "captions.json").write_text(text, encoding="utf-8")
        with pytest.raises(DatasetError, match=fact):
            list_dataset(data)


@pytest.mark.parametrize("without", ["no file", "empty file", "captions.json", "metadata.jsonl"])
def test_the_trigger_alone_may_be_the_caption(without: str, tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (20, 20), (20, 20))
    if without == "no file":
        (data / "p0001.txt").unlink()
    elif without == "empty file":
        (data / "p0001.txt").write_text(" \n", encoding="utf-8")
    elif without == "captions.json":
        (data / without).write_text('{"p0000.png": "picture 0"}', encoding="utf-8")
    else:
        (data / without).write_text('{"file_name": "p0000.png", "text": "picture 0"}', encoding="utf-8")
    found, notices = listed(data, "sks")
    assert found == {"p0000.png": "sks, picture 0", "p0001.png": "sks"}
    assert "pictures without a caption are trained with `trigger` alone (1): p0001.png" in notices
    with pytest.raises(DatasetError):
        list_dataset(data)


def test_broken_exif_is_ignored_with_a_word_and_a_sound_one_turns_the_picture(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 12\n457869660000ffff\n", zip=True)
    tiny.photograph(40, 20, seed=1).save(tmp_path / "junk.png", pnginfo=info)
    told: list[str] = []
    assert Example.open(tmp_path / "junk.png", "", told.append).size == (40, 20)
    assert told == [f"{tmp_path / 'junk.png'}: its EXIF is broken and ignored: see whether the picture is upright"]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        tiny.photograph(40, 20, seed=1).save(tmp_path / "turned.png", exif=exif)
        wide = orientation < 5
        assert Example.open(tmp_path / "turned.png", "", told.append).size == ((40, 20) if wide else (20, 40))
    assert len(told) == 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_with_any_damage_never_ends_in_a_warning_of_pillow_or_a_traceback(format: str) -> None:
    exif, rng, told = Image.Exif(), random.Random(0), 0
    exif[274], exif[272] = 6, "a camera"
    sound = exif.tobytes()
    for _ in range(60):  # each would fail by a warning, which is an error in tests
        broken, file = bytearray(sound), io.BytesIO()
        for _ in range(4):
            broken[rng.randrange(6, len(broken))] = rng.randrange(256)
        tiny.photograph(16, 8, seed=1).save(file, format, exif=bytes(broken[: rng.randrange(9, len(broken) + 20)]))
        decoded = decode(file.getvalue(), Path("x.png"))
        assert decoded.picture.size in ((16, 8), (8, 16))
        told += bool(decoded.remarks)
    assert told > 20


def test_a_picture_file_with_several_pictures_is_told(tmp_path: Path) -> None:
    first, second = tiny.photograph(20, 20, seed=1), tiny.photograph(20, 20, seed=2)
    for name in ("x.gif", "x.tif", "x.webp", "x.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        told: list[str] = []
        Example.open(tmp_path / name, "", told.append)
        assert told == [f"{tmp_path / name}: holds 2 pictures: only the first is used"]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 70_000, dtype)).save(tmp_path / "x.tif")
    with pytest.raises(DatasetError, match=r"x\.tif: its pixels have more than 16 bits, or are fractions"):
        decode((tmp_path / "x.tif").read_bytes(), tmp_path / "x.tif")


@pytest.mark.parametrize("when", ["kept", "forgotten"])
def test_what_was_checked_is_what_is_used(when: str, tmp_path: Path) -> None:
    tiny.photograph(20, 20, seed=1).save(tmp_path / "x.png")
    example = Example.open(tmp_path / "x.png", "")
    before, original = example.pixels(16, 16), (tmp_path / "x.png").read_bytes()
    tiny.photograph(20, 20, seed=2).save(tmp_path / "x.png")
    if when == "kept":
        np.testing.assert_array_equal(example.pixels(16, 16), before)
        return
    example.content.forget()
    with pytest.raises(FormatError, match=r"x\.png: was changed after it was checked: start again"):
        example.pixels(16, 16)
    (tmp_path / "x.png").write_bytes(original)
    np.testing.assert_array_equal(example.pixels(16, 16), before)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_a_mask_shows_only_what_was_painted_on_an_empty_layer(mode: str, tmp_path: Path) -> None:
    alpha = np.zeros((16, 16), np.uint8)
    alpha[4:8, 2:6] = 255
    layer = Image.fromarray(np.full((16, 16), 255, np.uint8)).convert("RGB")  # white, below what is transparent as well
    layer.putalpha(Image.fromarray(alpha))
    (layer if mode == "RGBA" else layer.convert(mode)).save(
        tmp_path / "mask.tif" if mode == "PA" else tmp_path / "m.png"
    )
    source = tmp_path / ("mask.tif" if mode == "PA" else "m.png")
    for given in (source, Image.open(source)):
        mask = black_and_white(read_given(given).picture)
        np.testing.assert_array_equal(np.asarray(mask), alpha)
