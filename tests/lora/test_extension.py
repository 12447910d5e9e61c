"""An invented kind of update and an invented spelling: one class and one entry, and all of the program knows them.

Nothing else is changed here, so a fact of kinds or of spellings that has a second home makes these tests fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import lora_makers, tiny
from support.networks import HAS_MLX, mlx_only
from support.tiny_loras import ALPHA, BASE, FACTORS, LAYERS, RANK, SHAPES, assert_same, difference, make

import zimage_ref
from zimage_cli.app import main
from zimage_ref import ConfigError, TrainConfig, WeightError
from zimage_ref.formats.tensors import Array
from zimage_ref.lora.alpha import AlphaSource, FoundAlpha
from zimage_ref.lora.arithmetic import AnyArray, Arithmetic
from zimage_ref.lora.file import read_lora, write_lora
from zimage_ref.lora.keys import Spelling
from zimage_ref.lora.kinds import KINDS, DoRA
from zimage_ref.lora.merge import combine_loras
from zimage_ref.lora.namings import with_alpha_keys
from zimage_ref.lora.parts import Parts
from zimage_ref.lora.spellings import SPELLINGS, companions, lora_namings
from zimage_ref.lora.updates import LoRA, Plain

if HAS_MLX:
    import zimage_mlx

REQUEST = {"prompt": "a red fox", "width": 32, "height": 16, "steps": 1, "output": "array"}
SAME = 2e-3  # float32 pictures in 0..1, weights rounded at other places


@dataclass(frozen=True)
class OuterSum(Plain):
    """s (R + C): a number for each row, and one for each column."""

    title = "LoSum"
    style = "LoSum"
    suffixes: ClassVar[Mapping[str, str]] = {".sum_rows": "R", ".sum_columns": "C"}
    forms = ({"R", "C"},)

    R: Array  # (out, 1)
    C: Array  # (1, in)

    @classmethod
    def of_parts(cls, parts: Parts) -> OuterSum:
        return cls(parts.array("R"), parts.array("C"), scale=parts.scale(2))

    def tensors(self) -> dict[str, Array]:
        return {"R": self.R, "C": self.C, "alpha": np.array(2 * self.scale, np.float32)}

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.R), self.C.shape[1]

    @property
    def rank(self) -> int:
        return 2

    def matrix(self, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        return arithmetic.array(self.R) + arithmetic.array(self.C)

    def folded(self) -> OuterSum:
        scale = np.float32(self.scale)
        return OuterSum(self.R * scale, self.C * scale)

    def rows(self, start: int, stop: int) -> OuterSum:
        return replace(self, R=self.R[start:stop])


def in_pounds(path: Path, metadata: Mapping[str, object]) -> FoundAlpha | None:
    """The strength of the invented spelling, in a text file beside the LoRA."""
    file = path.with_suffix(".pounds")
    if not file.is_file():
        return None
    pounds = float(file.read_text(encoding="utf-8"))
    return "pounds", lambda module, rank: pounds / rank


INVENTED = Spelling(
    software="Inventor",
    prefixes=("inv@",),
    style="left/right",
    suffixes={"|right": "A", "|left": "B", "|lengths": "magnitude"},
    modules={"attention.three": ("attention.to_q", "attention.to_k", "attention.to_v")},
    separator="_",
    alpha=AlphaSource(in_pounds, beside=lambda path: path.with_suffix(".pounds")),
    naming="inventor",
    write=with_alpha_keys,
)


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, OuterSum.title, OuterSum)


@pytest.fixture
def spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPELLINGS, INVENTED.software, INVENTED)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("extension") / "model")


def sums() -> LoRA:
    """An update of the invented kind for every layer."""
    rng = np.random.default_rng(0)
    return {
        layer: OuterSum(
            rng.standard_normal((outputs, 1)).astype(np.float32) / 8,
            rng.standard_normal((1, inputs)).astype(np.float32) / 8,
            scale=0.5,
        )
        for layer, (outputs, inputs) in LAYERS.items()
    }


def inventors_file(folder: Path) -> Path:
    """The LoRA of `FACTORS` as the inventor's own tool writes it: q, k and v in one, no alpha keys."""
    lora_makers.kohya_native(folder / "kohya.safetensors", FACTORS, ALPHA, BASE)
    names = {
        ".lora_down.weight": "|right",
        ".lora_up.weight": "|left",
        "lora_unet_": "inv@",
        "_attention_qkv": ".attention.three",
    }
    tensors = {}
    for key, array in load_file(folder / "kohya.safetensors").items():
        for old, new in names.items():
            key = key.replace(old, new)
        if not key.endswith(".alpha"):
            tensors[key.replace("layers_", "layers.").replace("refiner_", "refiner.")] = array
    path = folder / "inventor.safetensors"
    save_file(tensors, path)
    path.with_suffix(".pounds").write_text(str(ALPHA), encoding="utf-8")
    return path


def pictures(model: Path, *loras: Path) -> list[np.ndarray]:
    """The same picture by NumPy, by MLX, and by MLX with all LoRAs merged."""
    engines = [zimage_ref.ZImagePipeline.from_pretrained(model)]
    engines += [zimage_mlx.ZImagePipeline.from_pretrained(model, "float32", lean=lean) for lean in (False, True)]
    return [engine(**REQUEST, loras=loras)[0] for engine in engines]


def test_the_invented_kind_is_written_and_read(kind: None, tmp_path: Path) -> None:
    lora, path = sums(), tmp_path / "x.safetensors"
    for naming, scale in (("comfy", 1.0), ("kohya", 0.5), ("musubi", 0.5)):
        write_lora(path, lora, {}, naming, "f32")
        file = read_lora(path, SHAPES)
        assert file.kinds == {"LoSum": len(LAYERS)} and file.ranks == [2] and file.scales == [scale]
        assert file.dialect.endswith("*.LoSum)")
        assert_same(file.updates, lora)
    for naming in ("peft", "burn"):
        with pytest.raises(WeightError, match=r"LoSum\).*: use comfy or musubi or kohya"):
            write_lora(path, lora, {}, naming)


def test_the_invented_kind_is_read_fused_and_within_dora(kind: None, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(1), tmp_path / "x.safetensors"
    R, C, m = (rng.standard_normal(shape).astype(np.float32) for shape in ((288, 1), (1, 96), (288, 1)))
    name = "diffusion_model.layers.0.attention.qkv"
    save_file({f"{name}.sum_rows": R, f"{name}.sum_columns": C, f"{name}.dora_scale": m}, path)
    updates = read_lora(path, SHAPES).updates
    for i, part in enumerate("qkv"):
        rows, update = slice(96 * i, 96 * i + 96), updates[f"layers.0.attention.to_{part}"]
        assert isinstance(update, DoRA)
        np.testing.assert_allclose(update.update.plain.dense(), R[rows] + C, atol=1e-6)
        np.testing.assert_array_equal(update.magnitude, m[rows])


def test_the_invented_kind_has_a_norm_is_added_and_reduced(kind: None) -> None:
    lora = sums()
    for name, update in lora.items():
        assert update.norm() == pytest.approx(np.linalg.norm(difference(update, name)), rel=1e-5)
    halves = combine_loras([(lora, 0.25), (lora, 0.75)])
    assert_same(halves, lora, 1e-5)
    few = combine_loras([(lora, 1.0)], rank=2)  # which is what a sum of rows and columns has
    assert {update.title for update in few.values()} == {"LoRA"}
    assert_same(few, lora, 1e-4)


def test_the_command_line_knows_the_invented_kind(
    kind: None, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lora, path, out = sums(), tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    write_lora(path, lora, {}, "kohya", "f32")
    assert main(["convert", "--model-type=lora", f"--input={path}", f"--output={out}", "--naming=comfy"]) == 0
    assert_same(read_lora(out, SHAPES).updates, lora)

    baked = tmp_path / "baked.npz"
    argv = ["convert", "--model-type=transformer", f"--input={model / 'transformer'}", f"--output={baked}"]
    assert main([*argv, f"--merge-lora={path}:0.7"]) == 0
    with np.load(baked) as tensors:
        for layer, update in lora.items():
            wanted = BASE[f"{layer}.weight"] + 0.7 * difference(update, layer)
            np.testing.assert_allclose(tensors[f"{layer}.weight"], wanted, atol=1e-5)

    capfd.readouterr()
    assert main(["inspect", f"--input={path}"]) == 0
    text = capfd.readouterr().out
    group = [lora[layer].norm() for layer in LAYERS if layer.startswith("layers.") and layer.endswith(".w2")]
    for fact in (f"{len(LAYERS)} LoSum", "ComfyUI (diffusion_model.*.LoSum)", "alpha keys", f"{max(group):.4g}"):
        assert fact in text


@mlx_only
def test_both_engines_draw_the_same_with_the_invented_kind(kind: None, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_lora(path, sums(), {}, "kohya", "f32")
    (plain, *_), (first, *others) = pictures(model), pictures(model, path)
    assert np.abs(first - plain).max() > 0.05
    for other in others:
        assert np.abs(other - first).max() < SAME


def test_the_invented_spelling_is_read_with_its_own_alpha(spelling: None, tmp_path: Path) -> None:
    path = inventors_file(tmp_path)
    file = read_lora(path, SHAPES)
    assert file.dialect == "Inventor (inv@*.left/right, fused qkv)"
    assert file.alpha_from == "pounds" and file.scales == [ALPHA / RANK]
    assert_same(file.updates, read_lora(make("kohya", tmp_path), SHAPES).updates)
    assert path.with_suffix(".pounds") in companions(path)
    path.with_suffix(".pounds").unlink()
    assert read_lora(path, SHAPES).scales == [1.0]


@pytest.mark.parametrize("name", ["kohya", "lokr", "loha", "full_difference", "onetrainer_dora"])
def test_the_invented_spelling_is_written_for_every_kind(name: str, spelling: None, tmp_path: Path) -> None:
    lora, path = read_lora(make(name, tmp_path), SHAPES).updates, tmp_path / "x.safetensors"
    write_lora(path, lora, {}, "inventor", "f32")
    assert all(key.startswith("inv@") and "attention.to" not in key for key in load_file(path))
    assert ("dora" in name) == any(key.endswith("|lengths") for key in load_file(path))
    file = read_lora(path, SHAPES)
    assert file.dialect.startswith("Inventor (inv@*.")
    assert_same(file.updates, lora)


def test_the_command_line_and_training_know_the_invented_spelling(
    spelling: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = make("comfy", tmp_path), tmp_path / "x.npz"
    assert main(["convert", "--model-type=lora", f"--input={path}", f"--output={out}", "--naming=inventor"]) == 0
    assert_same(read_lora(out, SHAPES).updates, read_lora(path, SHAPES).updates)
    capfd.readouterr()
    assert main(["inspect", f"--input={out}"]) == 0
    assert "Inventor (inv@*.left/right)" in capfd.readouterr().out
    assert lora_namings()[-1] == "inventor"
    assert TrainConfig(tmp_path, tmp_path, lora_format="inventor").lora_format == "inventor"


@mlx_only
def test_both_engines_draw_the_same_with_the_invented_spelling(spelling: None, model: Path, tmp_path: Path) -> None:
    made, wanted = pictures(model, inventors_file(tmp_path)), pictures(model, make("comfy", tmp_path))
    for one in made:
        assert np.abs(one - wanted[0]).max() < SAME


def test_without_their_entries_both_are_refused(tmp_path: Path) -> None:
    lora = sums()
    with pytest.raises(ConfigError, match="unknown naming 'inventor'"):
        write_lora(tmp_path / "x.safetensors", lora, {}, "inventor")
    with pytest.raises(WeightError, match="no Z-Image LoRA has: inv@"):
        read_lora(inventors_file(tmp_path), SHAPES)
    save_file({"diffusion_model.layers.0.attention.to_q.sum_rows": np.ones((96, 1))}, tmp_path / "y.safetensors")
    with pytest.raises(WeightError, match="no Z-Image LoRA has: .*sum_rows"):
        read_lora(tmp_path / "y.safetensors", SHAPES)
