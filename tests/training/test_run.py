"""A LoRA trained on real files, end to end: the files it writes, the loss it lowers, the pictures it changes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import tiny

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

import zimage_ref
from zimage_cli.app import main
from zimage_mlx import Saved, Step, TrainConfig, ZImagePipeline, make_plan, train
from zimage_ref import DatasetError
from zimage_ref.formats import safetensors
from zimage_ref.model.flow import add_noise, model_time, training_target
from zimage_ref.model.parameters import lora_modules

SIDE = 48  # 3 x 3 patches of 16 pixels: 9 image tokens, so padding is forced


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, data/ and what `zimage train` made of them in 60 steps."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.write_model_folder(folder / "model")
    tiny.write_dataset(folder / "data")
    files = [f"--model-dir={folder}/model", f"--dataset={folder}/data", f"--output={folder}/sks.safetensors"]
    options = f"--rank 4 --alpha 8 --epochs 15 --lr 5e-3 --resolution {SIDE} --save-every 25".split()
    assert main(["train", *files, *options]) == 0
    return folder


def test_training_writes_the_result_and_every_checkpoint(trained: Path) -> None:
    steps = sorted(path.name for path in trained.glob("sks*.safetensors"))
    assert steps == ["sks.safetensors", "sks.step25.safetensors", "sks.step50.safetensors"]
    tensors, metadata = safetensors.read(trained / "sks.safetensors")
    assert len(tensors) == 2 * 4 * 7  # A and B; 2 layers and 2 refiners; 7 Linear layers each
    assert metadata["rank"] == "4" and metadata["alpha"] == "8.0" and metadata["base_model"] == "model"
    sidecar = json.loads((trained / "sks.lora.json").read_text(encoding="utf-8"))
    assert sidecar["alpha_folded"] is True and sidecar["target_refiners"] is True
    assert not list(trained.glob(".*"))  # no temporary file stays


def test_the_lora_lowers_the_reference_loss(trained: Path) -> None:
    pipe = zimage_ref.ZImagePipeline.from_pretrained(trained / "model", dtype="float64")
    examples = tiny.read_dataset(trained / "data")
    latents = [pipe.vae.encode(e.pixels(SIDE, SIDE)[None]) for e in examples]
    captions = [pipe.encode_prompt(e.caption) for e in examples]

    def loss() -> float:
        """Of all pictures, at fixed sigmas with fixed noise."""
        rng, losses = np.random.default_rng(7), []
        for x_0, caption in zip(latents, captions, strict=True):
            for sigma in (0.25, 0.5, 0.75):
                noise = rng.standard_normal(x_0.shape)
                raw = pipe.transformer(add_noise(x_0, noise, sigma), np.array([model_time(sigma)]), [caption])
                losses.append(np.mean((raw - training_target(x_0, noise)) ** 2))
        return float(np.mean(losses))

    without = loss()
    pipe.use_loras(pipe.read_loras([(trained / "sks.safetensors", 1.0)]))
    assert loss() < 0.8 * without


def test_generate_makes_other_pictures_with_the_lora_and_the_same_on_both_backends(trained: Path) -> None:
    pictures = {}
    for backend in ("mlx", "numpy"):
        for lora in ([], [f"--lora={trained}/sks.safetensors"]):
            output = trained / f"{backend}{len(lora)}.png"
            options = ["--prompt", "sks picture number 1", "--width=48", "--height=80", "--steps=4", "--seed=3"]
            argv = ["generate", f"--model-dir={trained}/model", f"--output={output}", f"--backend={backend}"]
            assert main([*argv, *options, *lora]) == 0
            pictures[backend, len(lora)] = np.asarray(Image.open(output), np.int16)
    assert pictures["mlx", 0].shape == (80, 48, 3)
    assert np.abs(pictures["mlx", 0] - pictures["mlx", 1]).mean() > 2
    for lora in (0, 1):
        assert np.abs(pictures["mlx", lora] - pictures["numpy", lora]).max() <= 1


def test_layers_lie_in_the_file_as_they_run(trained: Path) -> None:
    tensors, metadata = safetensors.read(trained / "sks.safetensors")
    layers = [name.removeprefix("diffusion_model.").rpartition(".lora_")[0] for name in tensors]
    assert list(dict.fromkeys(layers)) == lora_modules(tiny.TRANSFORMER, TrainConfig(trained, trained).targets)
    assert list(metadata)[:4] == ["format", "base_model", "rank", "alpha"]


def test_the_seed_decides_the_order_and_the_result(trained: Path, tmp_path: Path) -> None:
    def run(seed: int) -> tuple[list[float], bytes]:
        output = tmp_path / f"seed{seed}.safetensors"
        config = TrainConfig(
            trained / "model",
            trained / "data",
            output,
            rank=2,
            epochs=2,
            resolution=SIDE,
            seed=seed,
            lr=1e-3,
            overwrite=True,
        )
        events = list(train(config))
        assert isinstance(events[-1], Saved)
        return [event.loss for event in events if isinstance(event, Step)], output.read_bytes()

    assert run(0) == run(0)
    assert run(0)[0] != run(1)[0]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda d: (d / "photo0.txt").unlink(), "photo0.png: has no caption"),
        (lambda d: (d / "photo1.txt").write_text(" \n", encoding="utf-8"), "photo1.txt: is empty"),
        (lambda d: (d / "photo2.webp").write_bytes(b"RIFFnonsense"), "photo2.webp: cannot be read"),
        (lambda d: [p.unlink() for p in d.iterdir()], "holds no pictures"),
    ],
    ids=["missing caption", "empty caption", "unreadable picture", "empty folder"],
)
def test_a_faulty_dataset_is_refused_before_the_model_is_opened(spoil, named: str, tmp_path: Path) -> None:
    data = tiny.write_dataset(tmp_path / "data")
    spoil(data)
    with pytest.raises(DatasetError, match=named):
        list(train(TrainConfig(tmp_path / "no-model-here", data, tmp_path / "x.safetensors")))


def test_a_run_opens_the_model_once(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, made = [], ZImagePipeline.__init__
    monkeypatch.setattr(ZImagePipeline, "__init__", lambda self, *a, **k: opened.append(made(self, *a, **k)))
    options = {"steps": 1, "resolution": SIDE, "preview_prompt": "a fox", "preview_steps": 1, "validation": "0.25"}
    events = list(train(TrainConfig(trained / "model", trained / "data", tmp_path / "x.safetensors", **options)))
    assert isinstance(events[-1], Saved) and len(opened) == 1


def test_a_plan_is_made_with_a_word_for_each_picture(trained: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    config = TrainConfig(trained / "model", trained / "data", validation="0.25", resolution=SIDE, epochs=2)
    plan = make_plan(config, lambda *progress: told.append(progress))
    assert told == [("pictures", done, 4) for done in (1, 2, 3, 4)]
    assert (len(plan.examples), len(plan.held_out), plan.total) == (3, 1, 6)
    tiny.write_dataset(tmp_path / "held")
    folder = make_plan(replace(config, validation=str(tmp_path / "held")))
    assert (len(folder.examples), len(folder.held_out), folder.total) == (4, 4, 8)
    assert make_plan(config, ranks=3).batches.batch_size == 3


CLASSES = [
    (path, node)
    for package in ("zimage_mlx", "zimage_ref")
    for path in (Path(__file__).parents[2] / package / "training").glob("*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
]


@pytest.mark.parametrize(("path", "made"), CLASSES, ids=[f"{path.stem}.{node.name}" for path, node in CLASSES])
def test_no_attribute_appears_after_an_object_is_made(path: Path, made: ast.ClassDef) -> None:
    def assigned(node: ast.AST) -> set[str]:
        stored = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
        return {n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"}

    fields = {n.target.id for n in made.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    methods = {n.name: assigned(n) for n in made.body if isinstance(n, ast.FunctionDef)}
    first = methods.pop("__init__", set()) | fields
    assert {name: later - first for name, later in methods.items() if later - first} == {}, path


def test_training_without_mlx_says_which_extra_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['mlx'] = None; from zimage_cli.app import main; "
        "sys.exit(main(['train', '--model-dir', 'm', '--dataset', 'd']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "zimage-mlx[cpu]" in done.stderr
