"""Damaged LoRA files: whatever is in them, they are read in full or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import lora_makers, tiny
from support.daily import daily

from zimage_ref import ZImageError
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.updates import parameter
from zimage_ref.model import parameters

SHAPES = parameters.transformer_parameters(tiny.TRANSFORMER)
LAYERS = {
    f"layers.0.{module}": SHAPES[f"layers.0.{module}.weight"]
    for module in ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
}
BASE = tiny.random_weights({f"{layer}.weight": shape for layer, shape in LAYERS.items()})


def flip(data: bytearray, rng: np.random.Generator) -> None:
    """A few bytes anywhere."""
    for _ in range(rng.integers(1, 9)):
        data[rng.integers(len(data))] = rng.integers(256)


def flip_start(data: bytearray, rng: np.random.Generator) -> None:
    """A few bytes where names, shapes and offsets are."""
    for _ in range(rng.integers(1, 5)):
        data[rng.integers(min(len(data), 1500))] = rng.integers(256)


def truncate(data: bytearray, rng: np.random.Generator) -> None:
    """The end is lost."""
    del data[rng.integers(len(data)) :]


def cut_out(data: bytearray, rng: np.random.Generator) -> None:
    """A piece is lost."""
    start = rng.integers(len(data))
    del data[start : start + rng.integers(1, 200)]


def insert(data: bytearray, rng: np.random.Generator) -> None:
    """A piece too many."""
    start = rng.integers(len(data))
    data[start:start] = rng.bytes(int(rng.integers(1, 200)))


def reword(data: bytearray, rng: np.random.Generator) -> None:
    """A word of the header becomes another of the same length: the file stays valid, its meaning does not."""
    words = (
        (b"lora_A", b"lora_B"), (b"to_q", b"to_k"), (b"to_q", b"to_w"), (b"F32", b"I32"), (b"F32", b"U32"),
        (b"96", b"69"), (b"[4,", b"[8,"), (b"alpha", b"alphb"), (b"layers", b"lagers"), (b"lokr_w1", b"lokr_w2"),
        (b"layers.0", b"layers.9"), (b"hada_w1_a", b"hada_w2_a"), (b"weight", b"wejght"), (b"_q", b"_v"),
        (b"diffusion_model", b"defusion_model_"), (b"to_q", b"to\\n"),
    )  # fmt: skip
    for index in rng.permutation(len(words))[:8]:
        old, new = words[index]
        at = data.find(old)
        if at >= 0:
            data[at : at + len(old)] = new
            return


MUTATIONS: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    flip, flip_start, truncate, cut_out, insert, reword,
)  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Every dialect's files by name, the LoRA first."""
    lora, found = lora_makers.factors(LAYERS), []
    for name, make in lora_makers.MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        make(folder / "lora.safetensors", lora, 3.0, BASE)
        paths = sorted(folder.iterdir(), key=lambda path: path.suffix == ".json")
        found.append({path.name: path.read_bytes() for path in paths})
    return found


@pytest.mark.parametrize("count", daily([200, 2000], 200))
def test_damaged_files_are_read_in_full_or_refused_in_one_line(
    count: int, originals: list[dict[str, bytes]], tmp_path: Path
) -> None:
    rng, refused = np.random.default_rng(4), 0
    for index in range(count):
        files = originals[index % len(originals)]
        for other in tmp_path.iterdir():
            other.unlink()
        victim = list(files)[rng.integers(len(files))]
        for name, content in files.items():
            data = bytearray(content)
            if name == victim:
                MUTATIONS[rng.integers(len(MUTATIONS))](data, rng)
            (tmp_path / name).write_bytes(data)
        try:
            file = read_lora(tmp_path / "lora.safetensors", SHAPES)
        except ZImageError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error)
        else:
            for name, update in file.updates.items():
                assert update.shape == SHAPES[parameter(name)] and np.isfinite(update.scale)
    assert count * 0.5 < refused < count * 0.95  # flipped data bits often make other, valid numbers


@pytest.mark.parametrize("alpha", ["16", None, [1], {}, True, float("inf"), float("nan")])
def test_an_alpha_that_is_no_number_is_refused(alpha: object, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    lora_makers.burn(path, lora_makers.factors(LAYERS), 3.0, BASE)
    path.with_suffix(".lora.json").write_text(json.dumps({"alpha": alpha}), encoding="utf-8")
    with pytest.raises(ZImageError, match="alpha"):
        read_lora(path, SHAPES)
