"""Weights that are read while the network computes: the same bytes as weights in memory, and little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import lora_makers, tiny
from support.daily import daily
from support.networks import mlx_only

from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats import npz, safetensors
from zimage_ref.formats.mapped_file import MappedFile
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.tensors import Array, Tensor
from zimage_ref.model import parameters
from zimage_ref.streaming import can_stream, pass_bytes

pytest.importorskip("mlx.core")
import mlx.core as mx

from zimage_mlx import ZImagePipeline
from zimage_mlx.networks import streaming
from zimage_mlx.networks.streaming import Stream
from zimage_mlx.networks.transformer import Block, Transformer

pytestmark = mlx_only
REQUEST = {"width": 64, "height": 32, "steps": 2, "output": "array"}
FORMS = {  # name of the written file -> how it is written
    "bf16.safetensors": {"dtype": "bf16"},
    "f16.safetensors": {"dtype": "f16"},
    "f32.npz": {},
    "bf16.npz": {"dtype": "bf16"},
    "comfy.safetensors": {"naming": "comfy"},
    "8.npz": {"quantization": Quantization(8, 32)},
    "4.safetensors": {"quantization": Quantization(4, 32), "dtype": "bf16"},
    "shards": {"max_shard_size": 300_000},
}


def written(model: Path, folder: Path, form: str) -> dict[str, Path]:
    """The transformer and the text encoder of `model` in another container."""
    parts = {}
    for part in ("transformer", "text_encoder"):
        how = dict(FORMS[form])
        if part == "text_encoder":
            how.pop("naming", None)
        parts[part] = folder / part / form
        write_model(open_source(model / part, part), Target(parts[part], part, **how))
    return parts


def picture(model: Path, dtype: str = "float32", quantize: int | None = None, parts: dict[str, Path] | None = None,
            loras: tuple[tuple[Path, float], ...] = (), stream: bool = True, **options: object) -> Array:  # fmt: skip
    pipe = ZImagePipeline.from_pretrained(model, dtype, lean=True, stream=stream, quantize=quantize, parts=parts)
    made: Array = pipe("a red fox", loras=loras, **{**REQUEST, **options})[0]
    assert not pipe.loaded
    return made


@pytest.mark.parametrize(
    "form", daily(FORMS, "f16.safetensors", "bf16.npz", "comfy.safetensors", "4.safetensors", "shards")
)
def test_every_container_makes_the_picture_of_weights_in_memory(form: str, model_dir: Path, tmp_path: Path) -> None:
    parts = written(model_dir, tmp_path, form)
    lean, streamed = (picture(model_dir, parts=parts, stream=stream) for stream in (False, True))
    np.testing.assert_array_equal(streamed, lean)
    assert lean.std() > 0.05


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("bfloat16", None), ("float16", None), ("bfloat16", 8), ("float32", 4)]
)
def test_weights_are_cast_and_quantized_as_they_arrive(dtype: str, quantize: int | None, model_dir: Path) -> None:
    lean, streamed = (picture(model_dir, dtype, quantize, stream=stream) for stream in (False, True))
    np.testing.assert_array_equal(streamed, lean)


def test_guidance_and_several_prompts_come_in_any_order(model_dir: Path) -> None:
    options = {"guidance": 3.0, "negative_prompt": "a blurred picture of nothing much"}
    lean, streamed = (picture(model_dir, stream=stream, **options) for stream in (False, True))
    np.testing.assert_array_equal(streamed, lean)
    pipes = [ZImagePipeline.from_pretrained(model_dir, "float32", lean=True, stream=stream) for stream in (False, True)]
    lean_many, streamed_many = (p(["a fox", "a big red star"], seed=[1, 2], batch_size=1, **REQUEST) for p in pipes)
    np.testing.assert_array_equal(streamed_many, lean_many)


@pytest.mark.parametrize(
    ("kind", "quantize"),
    daily(product(["comfy", "lokr", "lycoris_dora"], [None, 4]), ("comfy", None), ("lokr", 4), ("lycoris_dora", None)),
)
def test_loras_are_merged_into_each_block_or_stay_beside_it(
    kind: str, quantize: int | None, model_dir: Path, tmp_path: Path
) -> None:
    shapes = parameters.transformer_parameters(tiny.TRANSFORMER)
    weights = load_file(model_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    layers = {n.removesuffix(".weight"): s for n, s in shapes.items() if ".attention.to_" in n or ".w2." in n}
    path = tmp_path / "x.safetensors"
    getattr(lora_makers, kind)(path, lora_makers.factors(layers), 4.0, weights)
    loras = ((path, 0.7),)
    lean, streamed = (picture(model_dir, "float32", quantize, None, loras, stream) for stream in (False, True))
    np.testing.assert_array_equal(streamed, lean)
    assert np.abs(lean - picture(model_dir, "float32", quantize)).max() > 0.01


def test_loras_are_changed_between_pictures(model_dir: Path, tmp_path: Path) -> None:
    layers = {"layers.1.attention.to_q": (96, 96)}
    path = tmp_path / "x.safetensors"
    lora_makers.comfy(path, lora_makers.factors(layers), 4.0, {})
    pipe = ZImagePipeline.from_pretrained(model_dir, "float32", stream=True)
    latents = np.zeros((1, 16, 4, 8), np.float32)
    seen = []
    for loras in ((), ((path, 2.0),), ()):
        pipe.use_loras(pipe.read_loras(loras))
        conditioning = pipe.condition([mx.ones((5, 40))], 4, 8)
        seen.append(np.array(pipe.predict(mx.array(latents), 0.5, conditioning)))
    np.testing.assert_array_equal(seen[0], seen[2])
    assert np.abs(seen[0] - seen[1]).max() > 1e-4


def test_a_slow_disk_makes_the_same_picture(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, own = picture(model_dir), MappedFile.read_into

    def slowly(self: MappedFile, buffer: memoryview, offset: int) -> None:
        time.sleep(0.0005)
        own(self, buffer, offset)

    monkeypatch.setattr(MappedFile, "read_into", slowly)
    np.testing.assert_array_equal(picture(model_dir), expected)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def replaced(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("harm", "said"), [(cut, "has become shorter"), (touch, "was changed since"), (replaced, "was changed since")]
)
def test_a_file_that_changes_under_way_is_an_error_of_one_line(
    harm: object, said: str, model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    pipe = ZImagePipeline.from_pretrained(model, "float32", stream=True)

    def after_a_step(stage: str, done: int, total: int) -> None:
        if stage == "denoise" and done == 1:
            harm(file)  # type: ignore[operator]

    with pytest.raises(FormatError, match=f"{file.name}: {said}") as caught:
        pipe("a red fox", progress=after_a_step, **{**REQUEST, "steps": 4})
    assert "\n" not in str(caught.value)


def test_a_disk_that_fails_is_an_error_of_one_line(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(FormatError, match=r"safetensors: cannot be read: Input/output error"):
        picture(model_dir)


def test_what_must_be_computed_is_refused_with_the_command_that_helps(model_dir: Path, tmp_path: Path) -> None:
    tensors, _ = safetensors.read(model_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    columns = {name: Tensor.of(np.asfortranarray(t.read())) for name, t in tensors.items()}
    file = tmp_path / "columns.npz"
    np.savez(file, **{name: tensor.read() for name, tensor in columns.items()})
    (tmp_path / "config.json").write_text((model_dir / "transformer" / "config.json").read_text())
    assert not npz.read(file)[0]["layers.0.attention.to_q.weight"].streamable
    with pytest.raises(
        ConfigError, match=r"columns.npz: .* and `memory` stream .*zimage convert: `model_type` transformer, `input` /"
    ):
        picture(model_dir, parts={"transformer": file})
    lean = ZImagePipeline.from_pretrained(model_dir, "float32", lean=True, parts={"transformer": file})
    assert not can_stream(lean.folder) and lean("a red fox", **REQUEST)


def many_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of many blocks, whose weights are much larger than what a block computes."""
    monkeypatch.setattr(tiny, "TRANSFORMER", replace(tiny.TRANSFORMER, n_layers=40))
    return tiny.write_model_folder(folder)


def test_memory_holds_three_blocks_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = many_blocks(tmp_path, monkeypatch)
    pipe = ZImagePipeline.from_pretrained(model, "float32", stream=True)
    tensors = pipe.folder.weights["transformer"]
    block = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("layers.3."))
    resident = sum(t.nbytes for n, t in tensors.items() if not parameters.block_of(n))
    conditioning = pipe.condition([mx.ones((5, 40))], 4, 4)
    mx.eval(conditioning.caption)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(pipe.predict(mx.zeros((1, 16, 4, 4)), 0.5, conditioning))
    activations = 64 * 4 * (16 * 96 + 6 * 256)
    assert mx.get_peak_memory() - before < 3 * block + activations < resident + 42 * block / 8
    assert pass_bytes(pipe.folder) == sum(t.nbytes for t in tensors.values()) - resident
    pipe.release("transformer", "text_encoder")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_the_process_takes_what_mlx_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 700 MB. Few blocks are in memory, and pages of the file do not pile up."""
    wide = replace(tiny.TRANSFORMER, dim=1024, n_heads=8, axes_dims=(32, 48, 48), n_layers=12)
    monkeypatch.setattr(tiny, "TRANSFORMER", wide)
    model = tiny.write_model_folder(tmp_path)
    script = Path(__file__).parents[1] / "support" / "residence.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), str(model)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    size = sum(file.stat().st_size for file in (model / "transformer").glob("*.safetensors"))
    assert found["counted"] < size / 4
    assert found["anonymous"] < 1.2 * found["counted"] and found["mapped"] < 0.05 * size, found


def test_the_next_block_is_read_while_one_computes(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, then backward as a gradient goes: after the first time, no block has to be waited for."""
    begun: list[str] = []
    own = Stream._begin
    monkeypatch.setattr(Stream, "_begin", lambda self, block: begun.append(block) or own(self, block))
    pipe = ZImagePipeline.from_pretrained(model_dir, "float32", stream=True)
    model = pipe.transformer
    order = [*model.noise_refiner, *model.context_refiner, *model.layers]
    names = ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"]
    turn = model.weights.around(lambda block: None)
    for block in [*order, *reversed(model.layers)] * 2:
        turn(block)
    del begun[:]
    for block in [*order, *reversed(model.layers)]:
        turn(block)
    assert begun == [*names[1:], "layers.0", "noise_refiner.0"]  # the last one stays for its second turn
    pipe.release("transformer")


def test_the_model_is_free_when_it_is_released(model_dir: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(model_dir, "float32", stream=True)
    left = []
    for _ in range(2):  # the first time makes constants that stay for every model
        pipe.encode_prompt("a fox")
        mx.eval(pipe.predict(mx.zeros((1, 16, 4, 4)), 0.5, pipe.condition([mx.ones((5, 40))], 4, 4)))
        held = mx.get_active_memory()
        pipe.release("text_encoder", "transformer")  # waits for the blocks that are read ahead
        left.append(mx.get_active_memory())
    assert left[1] == left[0] < held


def test_the_embedding_reads_the_rows_of_its_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    safetensors.write(tmp_path / "x.safetensors", {"table": Tensor.of(table)})
    rows = streaming.RowsOnDemand(safetensors.read(tmp_path / "x.safetensors")[0]["table"], mx.float32)
    seen, own = [], MappedFile.read_into
    monkeypatch.setattr(MappedFile, "read_into", lambda s, b, o: seen.append(len(b)) or own(s, b, o))
    ids = np.array([[3, 49, 3], [0, 7, 49]])
    np.testing.assert_array_equal(np.array(rows(mx.array(ids))), table[ids])
    assert seen == [24] * 4


def test_a_block_without_its_weights_computes_nan(model_dir: Path) -> None:
    """So that a block that is run without `around` shows."""
    pipe = ZImagePipeline.from_pretrained(model_dir, "float32", stream=True)
    model: Transformer = pipe.transformer
    layout = model.layout([5], 4, 4)
    y = Block.__call__(
        model.layers[0], mx.ones((1, 64, 96)), layout.rotation, layout.mask, model.embed_time(mx.ones(1))
    )
    assert np.isnan(np.array(y)).all()
    pipe.release("transformer")


WAYS = [("bf16.npz", "bfloat16", None), ("f16.safetensors", "float32", 4)]
GPUS = [(*way, reads) for way in WAYS for reads in (True, False)]


@pytest.mark.parametrize(("form", "dtype", "quantize", "reads_on_cpu"), daily(GPUS, GPUS[1], GPUS[2]))
def test_what_a_gpu_converts_itself_is_the_same(
    form: str, dtype: str, quantize: int | None, reads_on_cpu: bool, model_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Metal reads into its own memory and quantizes there; CUDA takes copies and casts, too."""
    parts = written(model_dir, tmp_path, form)
    expected = picture(model_dir, dtype, quantize, parts, stream=False)
    monkeypatch.setattr(streaming, "on_gpu", lambda: True)
    monkeypatch.setattr(streaming, "READS_ON_CPU", reads_on_cpu)
    np.testing.assert_array_equal(picture(model_dir, dtype, quantize, parts), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list what is mapped")
def test_no_page_of_the_file_is_mapped_while_it_is_read(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, mapped = MappedFile.read_into, set[str]()

    def look(self: MappedFile, buffer: memoryview, offset: int) -> None:
        own(self, buffer, offset)
        mapped.update(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())

    pipe = ZImagePipeline.from_pretrained(model_dir, "float32", stream=True)
    encoder, transformer = pipe.text_encoder, pipe.transformer
    monkeypatch.setattr(MappedFile, "read_into", look)
    mx.eval(encoder(mx.array([1, 2, 3])), transformer(mx.zeros((1, 16, 4, 4)), mx.ones(1), [mx.ones((5, 40))]))
    assert len(mapped) > 10 and not [path for path in mapped if path.endswith(".safetensors")]
    pipe.release("transformer", "text_encoder")
