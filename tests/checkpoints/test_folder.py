"""Whole models: every layout, mixtures of them, and errors that name every place that was looked at."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from support import foreign, tiny

from zimage_cli.app import main
from zimage_ref import ModelFolder
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.checkpoints.hub import local_folder
from zimage_ref.errors import BackendError, ConfigError, FormatError, WeightError

COMPONENTS = ("transformer", "text_encoder", "vae")
CONFIGS = {"transformer": tiny.TRANSFORMER, "text_encoder": tiny.TEXT_ENCODER, "vae": tiny.VAE}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("folders") / "model")


def weights_equal(a: ModelFolder, b: ModelFolder) -> bool:
    return all(
        a.weights[c].keys() == b.weights[c].keys()
        and all((a.weights[c][n].read() == t.read()).all() for n, t in b.weights[c].items())
        for c in COMPONENTS
    )


def flat(model: Path, folder: Path, suffix: str, stems: tuple[str, str, str]) -> Path:
    for component, stem in zip(COMPONENTS, stems, strict=True):
        write_model(open_source(model, component), Target(folder / f"{stem}{suffix}", component))
    shutil.copy(model / "tokenizer" / "tokenizer.json", folder / "qwen3-tokenizer.json")
    return folder


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_flat_layout_takes_its_configs_from_the_files(suffix: str, model: Path, tmp_path: Path) -> None:
    folder = flat(model, tmp_path, suffix, ("z_image_turbo_bf16", "qwen3_4b_text_encoder", "ae"))
    opened = ModelFolder.open(folder)
    assert (opened.transformer, opened.vae) == (tiny.TRANSFORMER, tiny.VAE)
    assert weights_equal(opened, ModelFolder.open(model))


def test_comfyuis_folders_are_found(model: Path, tmp_path: Path) -> None:
    homes = {
        "transformer": ("comfy", "diffusion_models/my_finetune.safetensors"),
        "text_encoder": ("hf", "text_encoders/qwen_3_4b.safetensors"),
        "vae": ("ldm", "vae/ae.safetensors"),
    }
    for component, (dialect, file) in homes.items():
        arrays = foreign.official(model, component)
        foreign.write(tmp_path / file, foreign.in_dialect(arrays, component, dialect, CONFIGS[component]))
        (tmp_path / component).mkdir(exist_ok=True)
        shutil.copy(model / component / "config.json", tmp_path / component)
    foreign.write(tmp_path / "text_encoders" / "another.safetensors", {})
    with pytest.raises(FormatError, match=r"holds no tokenizer: looked for .*; give one as `tokenizer`"):
        ModelFolder.open(tmp_path)
    opened = ModelFolder.open(tmp_path, {"tokenizer": model / "tokenizer"})
    assert weights_equal(opened, ModelFolder.open(model))


def test_any_part_may_come_from_elsewhere(model: Path, tmp_path: Path) -> None:
    official = foreign.official(model, "transformer")
    doubled = {name: 2 * array for name, array in official.items()}
    burn = foreign.in_dialect(doubled, "transformer", "burn", tiny.TRANSFORMER)
    other = foreign.write(tmp_path / "other.bpk", burn)
    opened = ModelFolder.open(model, {"transformer": other, "vae": model / "vae", "text_encoder": None})
    for name, tensor in opened.weights["transformer"].items():
        assert (tensor.read() == doubled[name]).all()
    with pytest.raises(FormatError, match=r"`text_encoder` .*nowhere.npz: is not there"):
        ModelFolder.open(model, {"text_encoder": tmp_path / "nowhere.npz"})


def test_the_command_line_takes_parts_and_bits(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(open_source(model, "transformer"), Target(tmp_path / "t.npz", "transformer"))
    folder = tmp_path / "rest"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("transformer", "tokenizer"))
    argv = ["generate", f"--model-dir={folder}", "--prompt=x", "--width=32", "--height=32", "--steps=1"]
    assert main([*argv, "--backend=numpy"]) == 1
    parts = ["--transformer=t.npz", f"--tokenizer={model / 'tokenizer' / 'tokenizer.json'}", "--quantize=8"]
    assert main([*argv, "--backend=numpy", *parts]) == 0
    assert (tmp_path / "output.png").exists()


def test_what_is_missing_is_named_with_every_place(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        ModelFolder.open(tmp_path)
    for place in (
        "transformer/",
        "z_image_turbo_bf16, ",
        ".npz, .safetensors, .bpk, .gguf",
        "diffusion_models/",
        "`tr",
    ):
        assert place in str(caught.value)


def test_an_index_that_points_outside_its_folder_is_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = list(foreign.official(folder, "vae"))
    secret = tmp_path / "secret.safetensors"
    file.rename(secret)
    for target in ("../../secret.safetensors", str(secret), "..", "config.json"):
        index = {"weight_map": dict.fromkeys(names, target)}
        (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FormatError, match="not a safetensors file in its own folder"):
            ModelFolder.open(folder)


def test_official_sizes_are_assumed_where_nothing_tells_and_must_fit(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    arrays = foreign.official(folder, "transformer")
    shutil.rmtree(folder / "transformer")
    foreign.write(folder / "z_image.safetensors", arrays)
    with pytest.raises(WeightError, match=r"x_pad_token \(1, 96\) instead of \(1, 3840\)"):
        ModelFolder.open(folder)


def test_a_repository_is_taken_from_the_cache_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    asked = []

    def snapshot(name: str, local_files_only: bool = False, **options: object) -> str:
        asked.append((name, local_files_only))
        if name.endswith("Cached") or not local_files_only:
            return str(model)
        raise FileNotFoundError("not cached")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert ModelFolder.open(Path("Tongyi-MAI/Cached")).path == model
    assert local_folder("Tongyi-MAI/New") == model
    assert asked == [("Tongyi-MAI/Cached", True), ("Tongyi-MAI/New", True), ("Tongyi-MAI/New", False)]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendError, match=r"pip install 'zimage-mlx\[hub\]'"):
        local_folder("Tongyi-MAI/Z-Image-Turbo")
    for path in ("nowhere", "/a/b", "a/b/c"):
        with pytest.raises(ConfigError, match="is not a folder"):
            local_folder(path)
