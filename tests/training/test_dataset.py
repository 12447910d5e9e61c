"""Reading pictures and captions: every layout, and every fault by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from support.training_runs import pictures

from zimage_ref import DatasetError
from zimage_ref.training.dataset import fingerprint, hold_out, list_dataset, with_trigger


def test_subfolders_are_read_and_those_that_are_hidden_or_of_a_run_are_not(tmp_path: Path) -> None:
    tiny.write_dataset(tmp_path / "data" / "b")
    tiny.write_dataset(tmp_path / "data" / "a" / "deep")
    tiny.write_dataset(tmp_path / "data" / ".thumbnails")
    tiny.write_dataset(tmp_path / "data" / "lora.run" / "previews")
    examples = tiny.read_dataset(tmp_path / "data")
    names = [e.picture.relative_to(tmp_path / "data").as_posix() for e in examples]
    assert len(names) == 8 and names == sorted(names)
    assert names[0] == "a/deep/photo0.png" and names[-1] == "b/photo3.jpeg"
    assert examples[1].size == (64, 96) and len(examples[1].digest) == 64


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_captions_come_from_one_metadata_file(tmp_path: Path, key: str) -> None:
    data = pictures(tmp_path / "data" / "sub", (20, 20), (30, 20)).parent
    lines = [{"file_name": f"sub/p{i:04}.png", key: f"from the table {i}\u2028more"} for i in (1, 0)]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (data / "metadata.jsonl").write_text(text + "\n\n", encoding="utf-8")
    assert [e.caption for e in tiny.read_dataset(data)] == ["from the table 0\u2028more", "from the table 1\u2028more"]


def test_captions_come_from_captions_json(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (20, 20), (30, 20))
    (data / "captions.json").write_text('{"p0001.png": "one", "p0000.png": " zero "}', encoding="utf-8")
    assert [e.caption for e in tiny.read_dataset(data)] == ["zero", "one"]


@pytest.mark.parametrize(
    ("name", "text", "fact"),
    [
        ("captions.json", '{"p0000.png": "a"}', "captions.json: has no caption for p0001.png"),
        ("captions.json", '{"p0000.png": "a", "p0001.png": "b", "p7.png": "c"}', "names p7.png, which the folder"),
        ("captions.json", '{"p0000.png": "a", "p0001.png": " "}', "the caption of p0001.png is not a text"),
        ("metadata.jsonl", '{"file_name": "p0000.png"}', "metadata.jsonl: line 1 needs file_name and one of text"),
        ("metadata.jsonl", '{"file_name": "p0000.png", "text": "a"}\n{', "line 2 is not JSON"),
        ("metadata.jsonl", '{"file_name": "p0000.png", "text": "a"}\n' * 2, "line 2 names p0000.png a second time"),
    ],
)
def test_a_faulty_caption_file_is_refused(tmp_path: Path, name: str, text: str, fact: str) -> None:
    data = pictures(tmp_path / "data", (20, 20), (30, 20))
    (data / name).write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=fact):
        list_dataset(data)


def test_two_caption_files_are_refused(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (20, 20))
    for name in ("captions.json", "metadata.jsonl"):
        (data / name).write_text("{}", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"both metadata\.jsonl and captions\.json"):
        list_dataset(data)


def test_the_trigger_replaces_its_mark_or_comes_first() -> None:
    assert with_trigger("a [trigger] in snow", "sks") == "a sks in snow"
    assert with_trigger("a fox", "sks") == "sks, a fox"
    assert with_trigger("a sks fox", "sks") == "a sks fox"
    assert with_trigger("a [trigger]", "") == "a [trigger]"


def test_pixels_are_cut_around_the_centre_and_mirrored_on_demand(tmp_path: Path) -> None:
    (example,) = tiny.read_dataset(pictures(tmp_path / "data", (40, 20)))
    plain, mirrored = example.pixels(16, 16), example.pixels(16, 16, flip=True)
    assert plain.shape == (3, 16, 16) and plain.dtype == np.float32
    np.testing.assert_array_equal(mirrored, plain[:, :, ::-1])
    assert np.abs(plain - mirrored).max() > 0.1


def test_holding_out_splits_the_examples_by_seed(tmp_path: Path) -> None:
    examples = tiny.read_dataset(pictures(tmp_path / "data", *[(16 + i, 20) for i in range(10)]))
    kept, held = hold_out(examples, 0.3, seed=1)
    assert len(kept) == 7 and len(held) == 3 and {*kept, *held} == {*examples}
    assert hold_out(examples, 0.3, seed=1) == (kept, held) != hold_out(examples, 0.3, seed=2)
    assert len(hold_out(examples, 0.01, seed=1)[1]) == 1
    with pytest.raises(DatasetError, match="leaves none to train on"):
        hold_out(examples[:1], 0.5, seed=1)


def test_the_fingerprint_follows_pixels_and_captions(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", (20, 20), (30, 20))
    before = fingerprint(tiny.read_dataset(data))
    assert fingerprint(tiny.read_dataset(data)) == before
    (data / "p0000.txt").write_text("another caption", encoding="utf-8")
    recaptioned = fingerprint(tiny.read_dataset(data))
    tiny.photograph(30, 20, seed=99).save(data / "p0001.png")
    assert len({before, recaptioned, fingerprint(tiny.read_dataset(data))}) == 3
