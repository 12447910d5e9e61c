"""Conversion: what is written, what is refused before anything is read, what is left behind when it fails."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.daily import SIGNALS, daily

from zimage_cli.app import main
from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.errors import ConfigError, FormatError
from zimage_ref.formats import npz, safetensors
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.shards import parse_size
from zimage_ref.formats.tensors import BFLOAT16, DTYPES, Tensor, cast, count_nonfinite
from zimage_ref.model.parameters import transformer_parameters


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model_folder(tmp_path_factory.mktemp("convert") / "model")


def convert(*argv: object) -> int:
    return main(["convert", *map(str, argv)])


def test_the_record_says_what_the_file_is(model: Path, tmp_path: Path) -> None:
    for suffix in ("npz", "safetensors"):
        write_model(open_source(model, "vae"), Target(tmp_path / f"a.{suffix}", "vae"))
        record = Checkpoint.open(tmp_path / f"a.{suffix}").record
        assert record["model_type"] == "vae" and record["config"] == tiny.VAE.to_json()
        source = {"file": "diffusion_pytorch_model.safetensors", "container": "safetensors", "dialect": "diffusers"}
        assert record["source"] == source


def test_order_and_bytes_do_not_depend_on_the_source(model: Path, tmp_path: Path) -> None:
    source = open_source(model, "transformer")
    shuffled = dict(sorted(source.tensors.items(), key=lambda item: item[0][::-1]))
    (tmp_path / "other").mkdir()
    safetensors.write(tmp_path / "other" / source.path.name, shuffled)
    shutil.copy(model / "transformer" / "config.json", tmp_path / "other")
    write_model(source, Target(tmp_path / "a.npz", "transformer"))
    write_model(open_source(tmp_path / "other", "transformer"), Target(tmp_path / "b.npz", "transformer"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7FC00000, 0x7F800001, 0xFF800000])
    rounded = cast(bits.astype("<u4").view("<f4"), BFLOAT16).view("<u2")
    assert rounded.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FC0, 0x7FC0, 0xFF80]


def test_blocks_are_cast_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).standard_normal((37, 5, 3)).astype(np.float32)
    whole = {name: cast(array, DTYPES[name]) for name in ("bf16", "f16")}
    monkeypatch.setattr("zimage_ref.formats.tensors._BLOCK", 20)
    for name, expected in whole.items():
        np.testing.assert_array_equal(cast(array, DTYPES[name]), expected)
        np.testing.assert_array_equal(cast(array.T, DTYPES[name]), expected.T)


def test_overflow_and_nan_are_counted_and_told(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    tensors = dict(safetensors.read(model / "vae" / "diffusion_pytorch_model.safetensors")[0])
    name = "decoder.conv_in.weight"
    values = tensors[name].read().copy()
    values.flat[:6] = [1e5, -1e6, np.inf, np.nan, np.nan, 6e4]
    tensors[name] = Tensor.of(values)
    folder = tmp_path / "vae"
    safetensors.write(folder / "a.safetensors", tensors)
    shutil.copy(model / "vae" / "config.json", folder)
    report = write_model(open_source(folder, "vae"), Target(tmp_path / "a.npz", "vae", "f16"))
    assert (report.overflowed, report.nans, report.overflowed_in) == (2, 2, [name])
    report = write_model(open_source(folder, "vae"), Target(tmp_path / "b.npz", "vae", "bf16"))
    assert (report.overflowed, report.nans) == (0, 2)
    assert convert("--input", folder, "--output", tmp_path / "c.npz", "--model-type=ae", "--dtype=f16") == 0
    text = capfd.readouterr().err
    assert f"2 values were too large and became infinite, in {name}" in text and "2 values are NaN" in text
    assert count_nonfinite(cast(values, BFLOAT16)) == (2, 1)


def test_shards_hold_at_most_what_is_asked_and_are_read_back(model: Path, tmp_path: Path) -> None:
    source = open_source(model, "transformer")
    report = write_model(source, Target(tmp_path / "out", "transformer", max_shard_size=500_000))
    shards = sorted((tmp_path / "out").glob("*-of-*.safetensors"))
    assert len(shards) > 3 and set(report.files) == set((tmp_path / "out").iterdir())
    for shard in shards:
        tensors = safetensors.read(shard)[0]
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 500_000
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in source.tensors.values())
    again = open_source(tmp_path / "out", "transformer")
    assert again.config == tiny.TRANSFORMER
    for name, tensor in again.tensors.items():
        np.testing.assert_array_equal(tensor.read(), source.tensors[name].read(), strict=True)


def test_what_fits_one_shard_is_one_file_and_replaces_old_shards(model: Path, tmp_path: Path) -> None:
    source = open_source(model, "vae")
    write_model(source, Target(tmp_path / "a.safetensors", "vae", max_shard_size=200_000))
    assert not (tmp_path / "a.safetensors").exists() and len(list(tmp_path.iterdir())) > 3
    with pytest.raises(ConfigError, match="exists: give `overwrite`"):
        Target(tmp_path / "a.safetensors", "vae")
    write_model(source, Target(tmp_path / "a.safetensors", "vae", max_shard_size=10**9, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--output=x.bin"], "x.bin: unknown format: the suffix must be .npz or .safetensors"),
        (["--output=x"], "x: unknown format"),
        (["--output=precious.npz"], "precious.npz: exists: give --overwrite to replace it"),
        (["--output=x.npz", "--max-shard-size=1GB"], "only safetensors is written in shards"),
        (["--output=x.safetensors", "--max-shard-size=much"], "size 'much': give a number and a unit"),
        (["--output=x.npz", "--model-type=te"], "holds no text encoder: it looks like a Z-Image transformer"),
        (["--output=x.npz", "--naming=ldm"], "--naming ldm is not for the transformer: known are diffusers, comfy"),
        (["--output=x.npz", "--naming=comfy", "--quantize=4"], "joins matrices, so they are not quantized"),
        (["--output=x.npz", "--model-type=ae", "--quantize=4"], "the autoencoder is not quantized"),
        (["--output=x.npz", "--input=nowhere"], "nowhere: cannot be opened"),
        (["--output=precious.npz/x.npz", "--overwrite"], "x.npz: cannot be written: "),
        (["--output=x.npz", "--rank=4"], "--rank goes with --model-type lora"),
        (["--output=x.npz", "--model-type=lora", "--quantize=4"], "--quantize is not for LoRAs"),
        (["--output=x.npz", "--model-type=lora", "--max-shard-size=1GB"], "--max-shard-size is not for LoRAs"),
        (["--output=x.bin", "--model-type=lora"], "x.bin: a LoRA is written as .safetensors or .npz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_it_refuses_before_it_reads(
    options: list[str], fact: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Tensor, "read", lambda self: pytest.fail("read"), raising=False)
    (tmp_path / "precious.npz").write_bytes(b"precious")
    source = [] if any(option.startswith("--input") for option in options) else ["--input", model / "transformer"]
    assert convert(*source, "--model-type=t", *options) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and fact in line
    assert [p.name for p in tmp_path.iterdir()] == ["precious.npz"]
    assert (tmp_path / "precious.npz").read_bytes() == b"precious"


def test_it_refuses_a_disk_without_room(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(model, "transformer")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"the output takes 0\.00 GB, the disk has 0\.00 GB left"):
        write_model(source, Target(tmp_path / "deep" / "a.npz", "transformer"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["a.npz", "a.safetensors", "new/deep/a.npz", "shards"])
def test_a_failure_half_way_leaves_nothing_and_keeps_what_was_there(output: str, model: Path, tmp_path: Path) -> None:
    source = open_source(model, "transformer")
    path = tmp_path / output
    if path.suffix and path.parent == tmp_path:
        path.write_bytes(b"precious")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*")}

    def fail() -> Any:
        raise KeyboardInterrupt

    tensors = dict(source.tensors)
    last = list(tensors)[-1]
    tensors[last] = Tensor(tensors[last].shape, tensors[last].dtype, fail)
    shard = None if path.suffix else 300_000
    with pytest.raises(KeyboardInterrupt):
        write_model(source, Target(path, "transformer", max_shard_size=shard, overwrite=True), tensors)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*")} == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_leaves_nothing_behind(number: signal.Signals, code: int, model: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from zimage_ref.formats import tensors; slow = tensors.write_data\n"
        "import zimage_ref.formats.npz as npz\n"
        "npz.write_data = lambda *a: (slow(*a), print('going', flush=True), time.sleep(0.2))\n"
        "from zimage_cli.app import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = ["convert", f"--input={model}", "--model-type=t", f"--output={tmp_path / 'new' / 'a.npz'}"]
    process = subprocess.Popen([sys.executable, "-c", program, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert b"Traceback" not in errors and not list(tmp_path.iterdir())


def test_other_tensors_may_take_the_place_of_the_sources(model: Path, tmp_path: Path) -> None:
    source = open_source(model, "transformer")
    doubled = {n: t.view(t.shape, lambda array: 2 * array) for n, t in source.tensors.items()}
    write_model(source, Target(tmp_path / "a.npz", "transformer"), doubled, {"merged": ["x"]})
    tensors, record = npz.read(tmp_path / "a.npz")
    assert record["merged"] == ["x"]
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(tensors[name].read(), 2 * tensor.read())


def test_progress_ends_at_the_total(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    how = Quantization(8, 32)
    target = Target(tmp_path / "a.npz", "transformer", "bf16", how)
    report = write_model(open_source(model, "transformer"), target, progress=lambda *now: seen.append(now))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(report.written.values())


def test_the_summary_tells_sizes_before_and_after(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert convert("--input", model, "--output", tmp_path / "a.npz", "--model-type=t", "--dtype=bf16") == 0
    captured = capfd.readouterr()
    assert "73 tensors: f32 3.8 MB -> bf16 1.9 MB" in captured.err
    assert captured.out == f"{tmp_path / 'a.npz'}\n"


_MEASURED = """
import pathlib, sys
from zimage_cli.app import main
from zimage_cli.commands import convert
def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
code = main(sys.argv[1:])
print(code, peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A transformer of 155 MB, and the bytes of its largest tensor."""
    config = replace(tiny.TRANSFORMER, dim=960, n_heads=30, n_layers=1)
    shapes = transformer_parameters(config)
    path = tmp_path_factory.mktemp("large") / "a.safetensors"
    safetensors.write(path, {n: Tensor(s, DTYPES["f32"], partial(np.full, s, 0.5, "<f4")) for n, s in shapes.items()})
    return path, 4 * max(map(prod, shapes.values()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options",
    daily(["a.npz", "a.safetensors --naming=comfy", "a.npz --dtype=bf16", "a.npz --quantize=4"], "a.npz --quantize=4"),
)
def test_the_command_takes_less_than_three_large_tensors(options: str, large: tuple[Path, int], tmp_path: Path) -> None:
    source, largest = large
    output, *more = options.split()
    largest = max(largest, 4 * 3 * 960**2) if "--naming=comfy" in more else largest  # q, k and v are one tensor
    argv = ["convert", f"--input={source}", "--model-type=t", f"--output={tmp_path / output}", *more]
    done = subprocess.run([sys.executable, "-c", _MEASURED, *argv], capture_output=True, text=True, check=True)
    code, peak = map(int, done.stdout.split()[-2:])
    print(f"{peak / largest:.2f} largest tensors")
    assert code == 0 and peak < 3 * largest < source.stat().st_size / 3


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2 << 30), ("7B", 7)])
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "nanGB", "1e400GB", "0B"])
def test_sizes_without_meaning_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give a number and a unit"):
        parse_size(text)


@pytest.mark.oracle
@pytest.mark.parametrize("shard", [None, "400KB"])
def test_diffusers_and_transformers_open_what_is_written(shard: str | None, model: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs the extra oracle")
    transformers = pytest.importorskip("transformers", reason="needs the extra oracle")
    torch = pytest.importorskip("torch", reason="needs the extra oracle")
    classes = {
        "transformer": diffusers.ZImageTransformer2DModel, "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.Qwen3ForCausalLM,
    }  # fmt: skip
    for component, kind in classes.items():
        source, folder = open_source(model, component), tmp_path / component
        write_model(source, Target(folder, component, max_shard_size=parse_size(shard or "5GB")))
        loaded = kind.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
        for name, tensor in source.tensors.items():
            np.testing.assert_array_equal(loaded[name].numpy(), tensor.read(), err_msg=name)


@pytest.mark.oracle
def test_diffusers_converts_our_comfy_and_ldm_names_to_its_own(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs the extra oracle")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("torch")
    for component, naming in (("transformer", "comfy"), ("vae", "ldm")):
        source = open_source(model, component)
        path = tmp_path / f"{component}.safetensors"
        write_model(source, Target(path, component, naming=naming))
        state = {n: torch.tensor(t.read()) for n, t in safetensors.read(path)[0].items()}
        if component == "transformer":
            theirs = utils.convert_z_image_transformer_checkpoint_to_diffusers(state)
        else:
            config = {"block_out_channels": tiny.VAE.block_out_channels, "layers_per_block": 2}
            config |= {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
            theirs = utils.convert_ldm_vae_checkpoint(state, config)
        assert theirs.keys() == source.tensors.keys()
        for name, tensor in source.tensors.items():
            np.testing.assert_array_equal(theirs[name].numpy().reshape(tensor.shape), tensor.read())


def test_a_folder_of_two_checkpoints_must_be_named(model: Path, tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        write_model(open_source(model, "vae"), Target(tmp_path / name, "vae"))
    with pytest.raises(FormatError, match=r"holds 2 \*\.npz files \(a\.npz, b\.npz\): name one"):
        open_source(tmp_path, "vae")
