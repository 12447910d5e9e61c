"""Names and layouts of other programs: against the published files' names, and there and back bit for bit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign, tiny
from support.foreign import DIALECTS

import zimage_ref
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.checkpoints.identify import identify, official_weights
from zimage_ref.checkpoints.registry import COMPONENTS, model_parts
from zimage_ref.checkpoints.transformer import TRANSFORMER
from zimage_ref.errors import FormatError, WeightError
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.tensors import DTYPES, Tensor, cast
from zimage_ref.model import config as cfg

# names and shapes of the published files, of what burn's conversion makes of them, and diffusers' LDM name map
MANIFESTS = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "manifests.json.gz").read_bytes()))
CONFIGS: dict[str, Any] = {"transformer": tiny.TRANSFORMER, "text_encoder": tiny.TEXT_ENCODER, "vae": tiny.VAE}
ALL = [(component, dialect) for component, dialects in DIALECTS.items() for dialect in dialects]
PUBLISHED = [(c, d) for c, d in ALL if d in MANIFESTS[c]]
COUNTS = {"transformer": (521, 6_154_908_736), "text_encoder": (398, 4_022_468_096), "vae": (244, 83_819_683)}


def manifest(component: str, dialect: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in MANIFESTS[component][dialect].items()}


def unreadable(shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, DTYPES["bf16"], lambda: pytest.fail("headers are enough"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("dialects") / "model", "bf16")


@pytest.mark.parametrize(("component", "dialect"), PUBLISHED)
def test_published_names_map_both_ways_with_nothing_left_over(component: str, dialect: str) -> None:
    published, official = manifest(component, dialect), COMPONENTS[component].official
    file = Checkpoint(Path("file"), "safetensors", {n: unreadable(s) for n, s in published.items()}, {})
    identity = identify(file.tensors)
    assert identity is not None
    assert (identity.component, identity.dialect.name, identity.sizes) == (component, dialect, official)

    weights = official_weights(file, COMPONENTS[component], official)
    assert {n: t.shape for n, t in weights.items()} == COMPONENTS[component].parameters(official)
    assert (len(weights), sum(t.size for t in weights.values())) == COUNTS[component]

    back = DIALECTS[component][dialect].write(weights, official)
    expected = {n.removeprefix("model."): s for n, s in published.items()} if dialect == "hf" else published
    assert {n: t.shape for n, t in back.items()} == expected


@pytest.mark.parametrize("component", DIALECTS)
def test_burn_names_have_the_sources_and_transpositions_of_burns_conversion(component: str) -> None:
    source = {"transformer": "comfy", "text_encoder": "hf", "vae": "ldm"}[component]
    config, shapes = COMPONENTS[component].official, COMPONENTS[component].parameters(COMPONENTS[component].official)
    burn, other = (DIALECTS[component][d] for d in ("burn", source))
    for name, shape in shapes.items():
        here, there = burn.place(name, shape, config), other.place(name, shape, config)
        published, transposed = MANIFESTS["burn_source"][component][here.name]
        assert (published.removeprefix("model."), transposed) == (there.name, here.transposed)


def test_ldm_names_are_those_of_diffusers_own_conversion() -> None:
    shapes = COMPONENTS["vae"].parameters(cfg.OFFICIAL_VAE)
    ours = {name: DIALECTS["vae"]["ldm"].place(name, shape, cfg.OFFICIAL_VAE).name for name, shape in shapes.items()}
    assert ours == MANIFESTS["vae_ldm_of"]


def test_fused_and_transposed_matrices_are_where_their_programs_expect_them() -> None:
    rng = np.random.default_rng(0)
    shapes = COMPONENTS["transformer"].parameters(tiny.TRANSFORMER)
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    q, k, v, out = (arrays[f"layers.1.attention.{n}.weight"] for n in ("to_q", "to_k", "to_v", "to_out.0"))
    comfy = foreign.in_dialect(arrays, "transformer", "comfy", tiny.TRANSFORMER)
    burn = foreign.in_dialect(arrays, "transformer", "burn", tiny.TRANSFORMER)
    np.testing.assert_array_equal(comfy["layers.1.attention.qkv.weight"], np.vstack([q, k, v]))
    np.testing.assert_array_equal(burn["layers.1.attention.qkv.weight"], np.hstack([q.T, k.T, v.T]))
    np.testing.assert_array_equal(burn["layers.1.attention.to_out.weight"], out.T)
    np.testing.assert_array_equal(burn["x_pad_token"], arrays["x_pad_token"])

    vae = {n: rng.standard_normal(s) for n, s in COMPONENTS["vae"].parameters(tiny.VAE).items()}
    ldm = foreign.in_dialect(vae, "vae", "ldm", tiny.VAE)
    np.testing.assert_array_equal(
        ldm["decoder.mid.attn_1.q.weight"][:, :, 0, 0], vae["decoder.mid_block.attentions.0.to_q.weight"]
    )
    np.testing.assert_array_equal(
        ldm["decoder.up.0.block.2.conv1.weight"], vae["decoder.up_blocks.3.resnets.2.conv1.weight"]
    )


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("component", "dialect"), ALL)
def test_round_trips_are_exact(component: str, dialect: str, dtype: str, tmp_path: Path) -> None:
    config, shapes = CONFIGS[component], COMPONENTS[component].parameters(CONFIGS[component])
    arrays = {n: cast(a, DTYPES[dtype]) for n, a in tiny.random_weights(shapes).items()}
    original = foreign.in_dialect(arrays, component, dialect, config)
    source = open_source(foreign.write(tmp_path / "original.safetensors", original), component)
    assert (source.dialect, list(source.tensors)) == (dialect, list(shapes))

    write_model(source, Target(tmp_path / "ours.npz", component))
    ours = open_source(tmp_path / "ours.npz", component)
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours.tensors[name].read(), array, strict=True)
    back = foreign.in_dialect({n: t.read() for n, t in ours.tensors.items()}, component, dialect, config)
    assert back.keys() == original.keys()
    for name in original:
        np.testing.assert_array_equal(back[name], original[name], strict=True)


@pytest.mark.parametrize(("component", "naming"), [(c, n) for c, e in model_parts().items() for n in e.namings])
def test_every_naming_is_read_back_exactly(component: str, naming: str, model: Path, tmp_path: Path) -> None:
    source = open_source(model, component)
    write_model(source, Target(tmp_path / "named.safetensors", component, naming=naming))
    again = open_source(tmp_path / "named.safetensors", component)
    assert again.config == source.config and again.tensors.keys() == source.tensors.keys()
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].read(), tensor.read(), strict=True)


PREFIXES = {"transformer": "model.diffusion_model.", "text_encoder": "model.", "vae": "first_stage_model."}
CONTAINERS = [".safetensors", ".npz", ".bpk", ".legacy.bpk", ".gguf"]


@pytest.fixture(scope="module")
def picture(model: Path) -> np.ndarray:
    return draw(model, {})


def draw(model: Path, parts: dict[str, Path], package: Any = zimage_ref) -> np.ndarray:
    pipe = package.ZImagePipeline.from_pretrained(model, parts=parts)
    return pipe("a red fox", width=32, height=48, steps=1, output="array")[0]


def converted(model: Path, folder: Path, number: int, container: str) -> dict[str, Path]:
    """A file of each component, in one of its dialects, under a prefix now and then."""
    parts = {}
    for component, dialects in DIALECTS.items():
        dialect = list(dialects)[number % len(dialects)]
        prefix = PREFIXES[component] if number % 2 and dialect != "llama.cpp" else ""
        arrays = foreign.in_dialect(foreign.official(model, component), component, dialect, CONFIGS[component])
        arrays = {prefix + name: array for name, array in arrays.items()}
        parts[component] = foreign.write(folder / f"{component}{container}", arrays)
    return parts


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_dialect_in_every_container_holds_the_official_weights_and_makes_the_official_picture(
    container: str, model: Path, picture: np.ndarray, tmp_path: Path
) -> None:
    if container == ".gguf":
        pytest.importorskip("gguf", reason="reading .gguf needs the extra gguf")
    for number in range(max(map(len, DIALECTS.values()))):
        parts = converted(model, tmp_path / str(number), number, container)
        for component, path in parts.items():
            weights = open_source(path, component).tensors
            for name, array in foreign.official(model, component).items():
                np.testing.assert_array_equal(weights[name].read(), array, strict=True)
        np.testing.assert_array_equal(draw(model, parts), picture)


@pytest.mark.parametrize(("number", "container"), list(enumerate(CONTAINERS)))
def test_mlx_makes_the_same_picture_of_dialects_and_containers(
    number: int, container: str, model: Path, tmp_path: Path
) -> None:
    mlx = pytest.importorskip("zimage_mlx.pipeline", reason="MLX is not installed", exc_type=ImportError)
    if container == ".gguf":
        pytest.importorskip("gguf", reason="reading .gguf needs the extra gguf")
    parts = converted(model, tmp_path, number, container)
    np.testing.assert_array_equal(draw(model, parts, mlx), draw(model, {}, mlx))


def test_an_all_in_one_file_serves_two_components(model: Path, picture: np.ndarray, tmp_path: Path) -> None:
    arrays = {}
    for component, dialect, prefix in (
        ("transformer", "comfy", "model.diffusion_model."), ("vae", "ldm", "vae."),
        ("text_encoder", "hf", "text_encoders.qwen3_4b.transformer.model."),
    ):  # fmt: skip
        official = foreign.official(model, component)
        arrays |= {
            prefix + n: a for n, a in foreign.in_dialect(official, component, dialect, CONFIGS[component]).items()
        }
    path = foreign.write(tmp_path / "all.safetensors", arrays)
    np.testing.assert_array_equal(draw(model, dict.fromkeys(DIALECTS, path)), picture)


def comfy(model: Path) -> dict[str, np.ndarray]:
    official = foreign.official(model, "transformer")
    return foreign.in_dialect(official, "transformer", "comfy", tiny.TRANSFORMER)


def test_tensors_without_effect_are_not_read(model: Path, tmp_path: Path) -> None:
    arrays = comfy(model) | {"norm_final.weight": np.ones(96, np.float32)}
    open_source(foreign.write(tmp_path / "t.safetensors", arrays), "transformer")
    text = foreign.official(model, "text_encoder")
    text["lm_head.weight"] = text["model.embed_tokens.weight"]
    source = open_source(foreign.write(tmp_path / "te.safetensors", text), "text_encoder")
    assert "lm_head.weight" not in source.tensors

    folder = zimage_ref.ModelFolder.open(model)
    assert not any(n.startswith(("model.layers.2.", "model.norm.")) for n in folder.weights["text_encoder"])
    for name in [n for n in text if n.startswith(("model.layers.2.", "model.norm."))]:  # nor need they be there
        del text[name]
    open_source(foreign.write(tmp_path / "te.safetensors", text), "text_encoder")


def test_misfits_are_counted_and_listed_under_the_files_own_names(model: Path, tmp_path: Path) -> None:
    arrays = comfy(model)
    for i in range(12):
        arrays[f"strange.{i}"] = np.zeros(3, np.float32)
    del arrays["layers.1.attention.qkv.weight"], arrays["x_embedder.bias"]
    arrays["cap_pad_token"] = np.zeros((1, 95), np.float32)
    arrays["x_pad_token"] = np.zeros((1, 96), np.int32)
    path = foreign.write(tmp_path / "t.safetensors", arrays)
    with pytest.raises(WeightError) as caught:
        official_weights(Checkpoint.open(path), TRANSFORMER, tiny.TRANSFORMER)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    for fact in (
        "2 missing: x_embedder.bias, layers.1.attention.qkv.weight", "12 unknown: strange.0", "strange.9, and 2 more",
        "1 wrongly shaped: cap_pad_token (1, 95) instead of (1, 96)", "1 not of floating point: x_pad_token i32",
    ):  # fmt: skip
        assert fact in text


def test_a_tensor_with_and_without_its_prefix_is_there_twice(model: Path, tmp_path: Path) -> None:
    arrays = comfy(model)
    arrays["model.diffusion_model.x_embedder.bias"] = arrays["x_embedder.bias"]
    path = foreign.write(tmp_path / "t.safetensors", arrays)
    with pytest.raises(WeightError, match="x_embedder.bias is there twice"):
        open_source(path, "transformer")


def test_a_transposed_matrix_under_untransposed_names_is_refused(model: Path, tmp_path: Path) -> None:
    arrays = comfy(model)
    arrays = {n: np.ascontiguousarray(a.T) if n.endswith("w1.weight") else a for n, a in arrays.items()}
    with pytest.raises(WeightError, match="wrongly shaped"):
        open_source(foreign.write(tmp_path / "t.safetensors", arrays), "transformer")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["decoder.conv_in.weight"], "something else"),
        (["diffusion_model.layers.0.attention.to_q.lora_A.weight"], "a LoRA"),
        ([], "no tensors"),
    ],
)
def test_a_file_of_something_else_is_told_what_it_looks_like(names: list[str], words: str, tmp_path: Path) -> None:
    path = foreign.write(tmp_path / "x.safetensors", {name: np.zeros((2, 2), np.float32) for name in names})
    with pytest.raises(WeightError, match=words):
        open_source(path, "transformer")


def test_another_component_is_told_apart(model: Path) -> None:
    with pytest.raises(WeightError, match=r"holds no transformer: it looks like a Qwen3 text encoder \(hf names"):
        open_source(model / "text_encoder", "transformer")
    with pytest.raises(FormatError, match="holds no weights"):
        open_source(model / "tokenizer", "vae")
