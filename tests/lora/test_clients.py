"""The files that are written, read by the rules of other programs: whole, and at the right strength."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support import lora_clients
from support.tiny_loras import LAYERS, SHAPES, difference, make

from zimage_cli.app import main
from zimage_ref.lora.clients import CLIENTS, losses
from zimage_ref.lora.file import read_lora, write_lora
from zimage_ref.lora.kinds import Dense
from zimage_ref.lora.low_rank import LowRank
from zimage_ref.lora.spellings import lora_namings
from zimage_ref.lora.updates import LoRA

OTHERS = [client for client in CLIENTS if client.name in lora_clients.CLIENTS]
PAIRS = [(client.name, naming) for client in OTHERS for naming in client.namings]


def mixed() -> LoRA:
    """Ranks and scales that differ from layer to layer, in the blocks and adaLN."""
    rng, lora = np.random.default_rng(3), {}
    layers = [*LAYERS, "layers.0.adaLN_modulation.0", "noise_refiner.0.adaLN_modulation.0"]
    for i, layer in enumerate(layers):
        outputs, inputs = SHAPES[f"{layer}.weight"]
        A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((2 + i % 3, inputs), (outputs, 2 + i % 3)))
        lora[layer] = LowRank(A, B, scale=(2.0, 0.5, 0.75)[i % 3])
    return lora


def read_by(client: str, path: Path) -> tuple[dict[str, np.ndarray], set[str]]:
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    layers = {name.removesuffix(".weight").removesuffix(".bias") for name in SHAPES}
    return lora_clients.CLIENTS[client].read(load_file(path), metadata, sorted(layers))


def test_the_table_of_clients_and_their_rules_name_the_same_programs() -> None:
    assert {client.name for client in OTHERS} == lora_clients.CLIENTS.keys()
    assert {naming for _, naming in PAIRS} == {*lora_namings()} - {"burn"}


@pytest.mark.parametrize(("client", "naming"), PAIRS)
def test_a_file_is_read_whole_and_at_the_right_strength(client: str, naming: str, tmp_path: Path) -> None:
    lora = mixed()
    write_lora(tmp_path / "x.safetensors", lora, {}, naming, "f32")
    added, left = read_by(client, tmp_path / "x.safetensors")
    assert not left and added.keys() == lora.keys()
    for layer, update in lora.items():
        wanted = difference(update, layer)
        np.testing.assert_allclose(added[layer], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=layer)


@pytest.mark.parametrize("client", [client.name for client in OTHERS])
def test_the_namings_that_the_table_leaves_out_do_lose_keys(client: str, tmp_path: Path) -> None:
    known = next(c for c in OTHERS if c.name == client)
    for naming in {*lora_namings()} - {*known.namings, *known.untried}:
        write_lora(tmp_path / "x.safetensors", {k: v for k, v in mixed().items() if k in LAYERS}, {}, naming, "f32")
        added, left = read_by(client, tmp_path / "x.safetensors")
        assert left and added.keys() < LAYERS.keys(), naming


@pytest.mark.parametrize("naming", ["comfy", "kohya"])
def test_norms_and_biases_are_found_by_all_that_read_them(naming: str, tmp_path: Path) -> None:
    names = {
        "layers.0.attention.norm_q", "layers.1.attention.norm_k", "context_refiner.0.attention_norm1",
        "noise_refiner.0.ffn_norm2", "layers.0.adaLN_modulation.0.bias",
    }  # fmt: skip
    shapes = {name: SHAPES[name if name.endswith(".bias") else f"{name}.weight"] for name in names}
    lora: LoRA = {name: Dense(np.full(shape, i + 1.0, np.float32)) for i, (name, shape) in enumerate(shapes.items())}
    write_lora(tmp_path / "x.safetensors", lora, {}, naming, "f32")
    for client in ("ComfyUI", "mflux"):
        added, left = read_by(client, tmp_path / "x.safetensors")
        assert not left and added.keys() == lora.keys(), client
        for name, update in lora.items():
            np.testing.assert_array_equal(added[name], update.plain.dense())
    again = read_lora(tmp_path / "x.safetensors", SHAPES).updates
    assert again.keys() == lora.keys()


def test_layers_outside_the_blocks_keep_a_name_that_comfyui_knows(tmp_path: Path) -> None:
    lora: LoRA = {"all_x_embedder.2-1.bias": Dense(np.ones(96, np.float32))}
    write_lora(tmp_path / "x.safetensors", lora, {}, "comfy", "f32")
    assert list(load_file(tmp_path / "x.safetensors")) == ["diffusion_model.x_embedder.diff_b"]
    assert read_lora(tmp_path / "x.safetensors", SHAPES).updates.keys() == lora.keys()


@pytest.mark.parametrize(
    ("name", "naming", "words"),
    [
        ("kohya", "comfy", []),
        ("kohya", "kohya", []),
        ("kohya", "musubi", ["ComfyUI, InvokeAI, DiffSynth-Studio"]),
        ("kohya", "peft", ["DiffSynth-Studio"]),
        ("kohya", "burn", ["only z-image-train"]),
        ("loha", "comfy", ["LoHa: only ComfyUI, stable-diffusion.cpp"]),
        ("onetrainer_dora", "kohya", ["DoRA: no other program", "its own formula"]),
    ],
)
def test_converting_warns_of_what_programs_lose(
    name: str, naming: str, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = make(name, tmp_path), tmp_path / "out.safetensors"
    assert main(["convert", "--model-type=lora", f"--input={path}", f"--output={out}", f"--naming={naming}"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("warning:") == len(losses(read_lora(path).updates, naming))
    assert bool(words) == ("warning:" in said)
    for word in words:
        assert word in said


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "lora-files.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- clients -->")[2].partition("<!-- end of clients -->")[0].strip().splitlines()[2:]
    assert rows == [
        f"| {client.name} | {', '.join(f'`{naming}`' for naming in client.namings)} | "
        f"{', '.join(client.kinds)}{'; norms and biases' if client.norms else ''} |"
        for client in CLIENTS
    ]
