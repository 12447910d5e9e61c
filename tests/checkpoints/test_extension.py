"""Another network is one entry: an invented one is registered here, and every command knows it.

A fact that is missing from an entry is an error that names it, and no other place lists the networks.
"""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign, tiny

from zimage_cli.app import main
from zimage_ref import ConfigError, ModelFolder, TrainConfig, WeightError
from zimage_ref.checkpoints.component import Component, count_numbered
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.checkpoints.dialects import OFFICIAL, Dialect, Placement
from zimage_ref.checkpoints.identify import identify
from zimage_ref.checkpoints.registry import COMPONENTS, part_options
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.tensors import Tensor, Tensors
from zimage_ref.pictures.metadata import read_record

ROOT = Path(__file__).parents[2]
NAMES = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True)
class SketchConfig:
    """Of a network that reads sketches."""

    sketch_width: int
    depth: int

    @classmethod
    def from_json(cls, data: Any, source: str) -> SketchConfig:
        return cls(data["sketch_width"], data["depth"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sketch_parameters(config: SketchConfig) -> dict[str, tuple[int, ...]]:
    return {f"strokes.{i}.weight": (config.sketch_width,) * 2 for i in range(config.depth)}


def sketch_sizes(dialect: Dialect[SketchConfig], tensors: Tensors) -> SketchConfig:
    depth = count_numbered(tensors, r"(?:strokes|lines)\.(\d+)\.", 1)
    width, _ = dialect.official_shape(tensors, "strokes.0.weight", 2, SketchConfig(1, depth))
    return SketchConfig(width, depth)


LINES: Dialect[object] = Dialect("lines", lambda name, shape, config: Placement(name.replace("strokes", "lines")))
SKETCH = Component(
    name="sketch_net",
    title="sketch network",
    optional=True,
    official=SketchConfig(64, 3),
    config_key="sketch_width",
    parameters=sketch_parameters,
    sizes=sketch_sizes,
    not_quantized="it is only a sketch",
    dialects=(OFFICIAL, LINES),
    namings={"diffusers": OFFICIAL, "comfy": LINES},
    prefixes=("sketch_model.",),
    library=("diffusers", "SketchNet"),
    flat_stems=("z_image_sketch",),
    comfy_folders=("sketches",),
    model_types=("sketch",),
)
CONFIG = SketchConfig(8, 2)
ARRAYS = tiny.random_weights(sketch_parameters(CONFIG))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("component") / "model")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPONENTS, SKETCH.name, SKETCH)
    monkeypatch.setenv("COLUMNS", "300")


def with_sketch(model: Path, folder: Path, file: str) -> Path:
    """A copy of `model` that has a sketch network, too, in `file`."""
    shutil.copytree(model, folder)
    path = foreign.write(folder / file, ARRAYS)
    path.with_name("config.json").write_text(json.dumps(CONFIG.to_json()), encoding="utf-8")
    return folder


def test_a_model_is_whole_without_an_optional_component(model: Path) -> None:
    folder = ModelFolder.open(model)
    assert tuple(folder.configs) == tuple(folder.weights) == NAMES
    with pytest.raises(KeyError, match="sketch_net"):
        folder.config(SKETCH)


@pytest.mark.parametrize(
    "file",
    ["sketch_net/diffusion_pytorch_model.safetensors", "sketches/any.npz", "sketches/z_image_sketch.npz", "sketch.bpk"],
)
def test_its_file_is_found_in_every_layout_or_given(file: str, model: Path, tmp_path: Path) -> None:
    path = with_sketch(model, tmp_path / "model", file)
    opened = ModelFolder.open(path, {"sketch_net": path / file} if file == "sketch.bpk" else None)
    assert opened.config(SKETCH) == CONFIG and opened.transformer == tiny.TRANSFORMER
    assert opened.weights["sketch_net"].keys() == ARRAYS.keys()
    for name, tensor in opened.weights["sketch_net"].items():
        np.testing.assert_array_equal(tensor.read(), ARRAYS[name])


def test_its_file_must_fit_like_any_other(model: Path, tmp_path: Path) -> None:
    path = with_sketch(model, tmp_path / "model", "sketch_net/a.npz")
    foreign.write(path / "sketch_net" / "a.npz", {"strokes.0.weight": ARRAYS["strokes.0.weight"]})
    with pytest.raises(WeightError, match=r"1 missing: strokes\.1\.weight"):
        ModelFolder.open(path)


@pytest.mark.parametrize(("dialect", "first"), [("diffusers", "strokes."), ("lines", "lines.")])
@pytest.mark.parametrize("prefix", ["", "sketch_model."])
def test_it_is_told_from_the_others(dialect: str, first: str, prefix: str, model: Path) -> None:
    tensors = {prefix + name.replace("strokes.", first): Tensor.of(array) for name, array in ARRAYS.items()}
    identity = identify(tensors)
    assert identity is not None
    assert (identity.component, identity.dialect.name, identity.sizes) == ("sketch_net", dialect, CONFIG)
    assert str(identity).startswith(f"sketch network ({dialect} names")
    for name in NAMES:
        other = identify(Checkpoint.open(model / name).tensors)
        assert other is not None and other.component == name


@pytest.mark.parametrize("naming", SKETCH.namings)
def test_it_is_converted(naming: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, output = foreign.write(tmp_path / "a.npz", ARRAYS), tmp_path / "b.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()), encoding="utf-8")
    argv = ["convert", f"--input={source}", f"--output={output}", "--model-type=sketch"]
    assert main([*argv, f"--naming={naming}"]) == 0
    file = Checkpoint.open(output)
    assert (file.record["model_type"], file.record["config"]) == ("sketch_net", CONFIG.to_json())
    assert next(iter(file.tensors)) == {"diffusers": "strokes.0.weight", "comfy": "lines.0.weight"}[naming]
    np.testing.assert_array_equal(
        open_source(output, "sketch_net").tensors["strokes.1.weight"].read(), ARRAYS["strokes.1.weight"]
    )
    capfd.readouterr()
    assert main([*argv, "--overwrite", "--quantize=4"]) == 1
    assert "the sketch network is not quantized: it is only a sketch" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="`naming` ldm is not for the sketch network: known are diffusers, comfy"):
        Target(tmp_path / "c.npz", "sketch_net", naming="ldm")


def test_a_folder_of_it_is_written_and_read_back(tmp_path: Path) -> None:
    source = foreign.write(tmp_path / "a" / "a.npz", ARRAYS)
    (tmp_path / "a" / "config.json").write_text(json.dumps(CONFIG.to_json()), encoding="utf-8")
    report = write_model(
        open_source(source, "sketch_net"), Target(tmp_path / "b", "sketch_net", max_shard_size=1_000_000)
    )
    assert {file.name for file in report.files} == {"diffusion_pytorch_model.safetensors", "config.json"}
    assert open_source(tmp_path / "b", "sketch_net").config == CONFIG


def test_inspect_names_it_and_does_not_miss_it(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = with_sketch(model, tmp_path / "model", "sketch_net/a.npz")
    assert main(["inspect", "--input", str(path / "sketch_net")]) == 0
    assert "a Z-Image sketch network (diffusers names)" in capfd.readouterr().out
    for folder, file in ((path, str(path / "sketch_net" / "a.npz")), (model, None)):
        assert main(["inspect", "--input", str(folder), "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        part = found["components"]["sketch_net"]
        assert found["complete"] and (part["file"], part["problem"]) == (file, None)
        assert main(["inspect", "--input", str(folder)]) == 0
        (line,) = [line for line in capfd.readouterr().out.splitlines() if "sketch_net" in line]
        assert ("sketch_net/a.npz" in line) == (file is not None) and "missing" not in line


def test_the_command_line_offers_an_option_for_its_file(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help-all"])
    text = " ".join(capfd.readouterr().out.split())
    assert "--sketch-net PATH File or folder of the sketch network. It replaces the one in --model-dir." in text
    sketch = with_sketch(model, tmp_path / "other", "sketch_net/a.npz") / "sketch_net"
    argv = ["generate", f"--model-dir={model}", "--prompt=x", "--width=32", "--height=32", "--steps=1"]
    argv += ["--backend=numpy", f"--output={tmp_path / 'x.png'}", "--no-thumbnail"]
    assert main([*argv, "--sketch-net=nowhere.npz"]) == 1
    assert "--sketch-net nowhere.npz: is not there" in capfd.readouterr().err
    assert main([*argv, f"--sketch-net={sketch}"]) == 0
    assert read_record(tmp_path / "x.png")["sketch_net"] == str(sketch)


def test_an_entry_without_one_of_its_facts_is_refused_by_name() -> None:
    facts = {field.name: getattr(SKETCH, field.name) for field in fields(SKETCH)}
    for name in ("title", "official", "config_key", "parameters", "sizes", "dialects", "namings", "model_types"):
        with pytest.raises(TypeError, match=f"'{name}'"):
            Component(**{fact: value for fact, value in facts.items() if fact != name})


def test_training_takes_a_file_for_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of a run are written out, for type checkers; this is what holds them to the table."""
    monkeypatch.delitem(COMPONENTS, SKETCH.name)
    options = {field.name: field.metadata.get("help") for field in fields(TrainConfig)}
    for part, help in part_options().items():
        assert options.get(part) == help, f"TrainConfig needs a field {part}: Path | None, with help of part_options()"
    assert TrainConfig(Path("m"), Path("d"), vae="v.npz").parts == dict.fromkeys(part_options()) | {
        "vae": Path("v.npz")
    }


def listings(source: str) -> list[int]:
    """Lines of dictionaries, lists, tuples and sets that hold the names of all three networks."""
    found = []
    for node in ast.walk(ast.parse(source)):
        entries = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        if set(NAMES) <= {entry.value for entry in entries if isinstance(entry, ast.Constant)}:
            found.append(node.lineno)
    return found


def test_no_other_place_lists_the_components() -> None:
    assert listings('A = {"transformer": 1, "text_encoder": 2, "vae": 3}\nB = ["vae", "transformer", "text_encoder"]')
    files = [path for package in ("zimage_ref", "zimage_mlx", "cli") for path in (ROOT / package).rglob("*.py")]
    places = [
        f"{path.relative_to(ROOT)}:{line} lists the networks: take them from checkpoints.registry"
        for path in files
        for line in listings(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 100 and not places
