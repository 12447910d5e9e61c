"""Latents and captions on disk: computed once, never stale, never trusted when damaged."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.daily import daily
from support.leftovers import leave_half
from support.training_runs import Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

from zimage_mlx import ZImagePipeline, make_plan, train
from zimage_mlx.training.encode import EncodedDataset
from zimage_ref import FormatError, TrainingError
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.tensors import BFLOAT16
from zimage_ref.training import checked_dataset
from zimage_ref.training.cache import TrainCache, is_entry, read_entry, write_entry
from zimage_ref.training.dataset import Example, list_dataset
from zimage_ref.training.events import Encoded


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("cache"))


def _no_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, loading an encoder is an error."""
    for name in ("text_encoder", "vae"):
        monkeypatch.setattr(ZImagePipeline, name, property(lambda self: pytest.fail("an encoder was loaded")))


def test_a_second_run_loads_no_encoder_and_gives_the_same_lora(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 3, "flip": True, "caption_dropout": 0.3, "cache": tmp_path / "cache"}
    first = shop.train("first", **options)
    _no_encoders(monkeypatch)
    assert shop.train("second", **options).bytes == first.bytes


def test_the_cache_holds_exactly_what_the_networks_give(shop: Workshop) -> None:
    plan = make_plan(shop.config("plan"))
    pipeline = ZImagePipeline(plan.model)
    data = EncodedDataset(plan, pipeline)
    list(data.build())
    item = plan.batches.items[1]
    example = plan.examples[item.example]
    encoded = pipeline.vae.encode(example.pixels(*item.size)[None])[0]
    np.testing.assert_array_equal(data.latents(example, item.size), encoded)
    np.testing.assert_array_equal(data.caption(example.caption), pipeline.encode_prompt(example.caption))
    mirrored = pipeline.vae.encode(example.pixels(*item.size, flip=True)[None])[0]
    assert np.abs(np.array(mirrored) - np.array(encoded)).max() > 1e-3


def test_a_disk_that_is_full_before_the_cache_is_complete_is_named(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(TrainingError, match=r"full-cache: the disk is full: about \d+\.\d MB are missing"):
        shop.train("full", steps=1, cache=tmp_path / "full-cache")
    assert not [path for path in (tmp_path / "full-cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("kept", [True, False], ids=["small", "large"])
def test_a_picture_that_is_replaced_while_the_cache_is_built_is_never_stored_as_another(
    kept: bool, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pictures(tmp_path / "data", (32, 32))
    original = (data / "p0000.png").read_bytes()
    monkeypatch.setattr(checked_dataset, "_KEPT", 1 << 30 if kept else 0)
    options: dict[str, Any] = {"steps": 1, "dataset": data}
    shop.train(f"undisturbed{kept}", cache=tmp_path / "good", **options)
    events = train(shop.config(f"disturbed{kept}", cache=tmp_path / "bad", **options))
    with (
        contextlib.nullcontext() if kept else pytest.raises(FormatError, match=r"p0000\.png: was changed after it was")
    ):
        for event in events:
            if isinstance(event, Encoded) and event.what == "captions":
                tiny.photograph(32, 32, seed=99).save(data / "p0000.png")
    (data / "p0000.png").write_bytes(original)
    good = {path.name: read_entry(path) for path in (tmp_path / "good" / "latents").iterdir()}
    for path in (tmp_path / "bad").rglob("latents/*.safetensors"):
        np.testing.assert_array_equal(read_entry(path), good[path.name])
    assert len(list((tmp_path / "bad").rglob("latents/*.safetensors"))) == kept


@pytest.mark.parametrize(
    ("kind", "damage"),
    daily(product(["latents", "captions"], ["flipped", "cut", "empty"]), ("latents", "flipped"), ("captions", "cut")),
)
def test_a_damaged_entry_is_rebuilt(shop: Workshop, kind: str, damage: str, tmp_path: Path) -> None:
    options = {"steps": 1, "cache": tmp_path / "cache"}
    whole = shop.train(f"whole-{kind}-{damage}", **options).bytes
    for file in (tmp_path / "cache" / kind).iterdir():
        data = bytearray(file.read_bytes())
        data[-5] ^= 64
        file.write_bytes({"flipped": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
        assert not is_entry(file)
    assert shop.train(f"rebuilt-{kind}-{damage}", **options).bytes == whole
    assert all(is_entry(file) for file in (tmp_path / "cache" / kind).iterdir())


def test_an_entry_belongs_to_pixels_size_caption_and_model(tmp_path: Path, shop: Workshop) -> None:
    model = ModelFolder.open(shop.model)
    ((picture, caption),) = list_dataset(pictures(tmp_path / "one", (32, 32)))
    example = Example.open(picture, caption)
    tiny.photograph(32, 32, seed=77).save(picture)
    repainted = Example.open(picture, caption)

    other = tiny.write_model_folder(tmp_path / "other", dtype="bf16")
    cache, elsewhere = TrainCache(tmp_path, model, "cpu"), TrainCache(tmp_path, ModelFolder.open(other), "cpu")
    gpu = TrainCache(tmp_path, model, "gpu")
    four, eight = (TrainCache(tmp_path, model, "cpu", Quantization(bits)) for bits in (4, 8))
    assert len({entries.caption("a fox") for entries in (cache, four, eight)}) == 3
    entries = [
        cache.latents(example, (32, 32), False), cache.latents(example, (32, 32), True),
        cache.latents(example, (48, 32), False), cache.latents(repainted, (32, 32), False),
        elsewhere.latents(example, (32, 32), False), gpu.latents(example, (32, 32), False),
        cache.caption("a fox"), cache.caption("an owl"), elsewhere.caption("a fox"), gpu.caption("a fox"),
    ]  # fmt: skip
    assert len(set(entries)) == len(entries)
    again = TrainCache(tmp_path, ModelFolder.open(shop.model), "cpu")
    assert again.latents(example, (32, 32), False) == entries[0] and again.caption("a fox") == entries[6]


def test_entries_keep_bfloat16_bits(tmp_path: Path) -> None:
    value = np.arange(12, dtype="<u2").view(BFLOAT16).reshape(3, 4)
    write_entry(tmp_path / "e.safetensors", value)
    read = read_entry(tmp_path / "e.safetensors")
    assert read.dtype == BFLOAT16 and read.tobytes() == value.tobytes()
    with pytest.raises(FormatError):
        read_entry(tmp_path / "absent.safetensors")


def test_what_a_killed_process_left_in_the_cache_is_swept(shop: Workshop, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    leave_half(cache / "latents" / "x.safetensors")
    leave_half(tmp_path / "model" / "y.safetensors")
    shop.train("swept", steps=1, cache=cache)
    assert not list(cache.rglob(".*"))
    assert list((tmp_path / "model").rglob(".*"))  # not of this cache


_MEASURE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.training_runs import Workshop
shop = Workshop(Path({folder!r}), Path({model!r}), Path({data!r}))
run = shop.train({name!r}, epochs=1, cache=shop.folder / {name!r}, batch_size=8, targets="attention")
print(sum(step.pictures for step in run.steps), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_5000_pictures_train_in_the_memory_of_50(shop: Workshop, tmp_path: Path) -> None:
    peaks = {}
    for count in (50, 5000):
        data = tmp_path / f"data{count}"
        data.mkdir()
        for i in range(count):
            tiny.photograph(32, 32, seed=i).save(data / f"p{i}.png")
            (data / f"p{i}.txt").write_text(f"picture number {i}", encoding="utf-8")
        program = _MEASURE.format(
            tests=str(Path(__file__).parents[1]),
            folder=str(tmp_path),
            model=str(shop.model),
            data=str(data),
            name=f"n{count}",
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        trained, peak = map(int, done.stdout.split())
        assert trained == count
        peaks[count] = peak * (1 if sys.platform == "darwin" else 1024)
        shutil.rmtree(data)
    print({count: f"{peak / 1e6:.0f} MB" for count, peak in peaks.items()})
    assert peaks[5000] < peaks[50] + 60e6  # latents and captions alone would be 5000 x 21 kB = 105 MB
