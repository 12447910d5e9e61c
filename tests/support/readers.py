"""Every reader of the project, each with small valid files of what it reads, for `fuzzing`."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from support import foreign, lora_makers, quantizers, tiny
from support.fuzzing import Reader, as_json
from support.tiny_loras import ALPHA, BASE
from zimage_ref import ModelFolder, TrainConfig
from zimage_ref.checkpoints.identify import config_of, identify
from zimage_ref.checkpoints.transformer import TRANSFORMER
from zimage_ref.errors import FormatError
from zimage_ref.formats import npz, safetensors, shards
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.quantize import Quantization, quantized, unfold
from zimage_ref.formats.tensors import BFLOAT16, Tensor
from zimage_ref.generation.provenance import Repeat
from zimage_ref.inspection import describe, verify
from zimage_ref.lora.file import read_lora
from zimage_ref.model import parameters
from zimage_ref.model.tokenizer import Tokenizer
from zimage_ref.options_file import dump_options, read_options, to_json
from zimage_ref.pictures.images import read_given, save_picture
from zimage_ref.pictures.metadata import read_record
from zimage_ref.training.cache import read_entry, write_entry
from zimage_ref.training.dataset import list_dataset
from zimage_ref.training.metrics_lines import read_lines
from zimage_ref.training.report import page
from zimage_ref.training.run_folder import RunFolder

SHAPES = parameters.transformer_parameters(tiny.TRANSFORMER)
LAYERS = {
    layer: SHAPES[f"{layer}.weight"] for layer in map("layers.0.attention.to_{}".format, ("q", "k", "v", "out.0"))
}
ARRAYS = {
    "x_pad_token": np.ones((1, 6), np.float32), "layers.0.attention.qkv.weight": np.ones((18, 6), "<u2").view(BFLOAT16),
    "norm.gamma": np.arange(7, dtype=np.float16), "decoder.conv_in.weight": np.ones((2, 3, 1, 4), np.float32),
}  # fmt: skip
WEIGHT = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
RECORD = {
    "prompt": "a fox", "width": 64, "height": 64, "steps": 4, "guidance": 1.5, "seed": 3, "sampler": "heun",
    "model": "tiny", "backend": "numpy", "dtype": "float32", "shift": 3.0, "strength": 0.5, "init_image": "a.png",
    "loras": [{"file": "fox.safetensors", "scale": 0.8, "sha256": "0123"}], "version": "0.1", "quantize": 8,
}  # fmt: skip
Make = Callable[[Path], object]


def written(make: Make) -> dict[str, bytes]:
    """The files that `make` writes into a folder, by path."""
    with tempfile.TemporaryDirectory() as name:
        make(folder := Path(name))
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _tensors() -> dict[str, Tensor]:
    return {name: Tensor.of(array) for name, array in ARRAYS.items()}


def _npz(folder: Path) -> None:
    folded = unfold({"w.weight": quantized(Tensor.of(WEIGHT), Quantization(4, 32))})
    record = {"model_type": "transformer", "config": TRANSFORMER.official.to_json(),
              "quantization": Quantization(4, 32).to_json()}  # fmt: skip
    npz.write(folder / "a.npz", _tensors() | folded, record)


def _packed(folder: Path) -> None:
    stored = {}
    for maker in (quantizers.fp8, quantizers.mxfp8, quantizers.nvfp4, quantizers.int8_convrot, quantizers.awq):
        parts, _ = maker(np.tile(WEIGHT, (4, 4)))
        stored |= {f"layers.0.{maker.__name__}.{part}": array for part, array in parts.items()}
    quantizers.write(folder / "a.safetensors", stored)


def _index(folder: Path) -> None:
    shards.write(folder / "a.safetensors", _tensors(), {"format": "pt"}, limit=100)


def _numbered(folder: Path) -> None:
    _index(folder)
    (folder / "a.safetensors.index.json").unlink()


def _only(folder: Path, *suffixes: str) -> Path:
    """The file to open: an index, the first shard, or the only file."""
    files = sorted(folder.iterdir())
    return next((file for file in files if file.name.endswith(".index.json")), files[0])


def _weights(folder: Path) -> None:
    path = _only(folder)
    file = Checkpoint.open(path)
    identify(file.tensors)
    config_of(file, TRANSFORMER)
    for tensor in file.tensors.values():
        array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
    describe(file)
    verify(file)


def _lora(folder: Path) -> None:
    for update in read_lora(folder / "lora.safetensors", SHAPES).updates.values():
        assert np.isfinite(update.scale) and np.isfinite(update.norm())


def _lora_files(name: str) -> dict[str, bytes]:
    factors = lora_makers.factors(LAYERS)
    base = {f"{layer}.weight": BASE[f"{layer}.weight"] for layer in LAYERS}
    return written(lambda folder: lora_makers.MAKERS[name](folder / "lora.safetensors", factors, ALPHA, base))


def _picture(suffix: str, record: Mapping[str, object] | None = None) -> dict[str, bytes]:
    if suffix in ("png", "jpg", "webp"):
        return written(lambda folder: save_picture(tiny.photograph(40, 24, 1), folder / f"a.{suffix}", record))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    tiny.photograph(40, 24, 1).save(buffer, {"tif": "TIFF"}.get(suffix, suffix.upper()), exif=exif)
    return {f"a.{suffix}": buffer.getvalue()}


def _repeat(folder: Path) -> None:
    path = _only(folder)
    read_record(path)
    Repeat.read(path).config()


def _model(folder: Path) -> None:
    model = ModelFolder.open(folder / "model")
    Tokenizer(model.tokenizer).encode("a fox in the snow")


def _tokenizer(folder: Path) -> None:
    Tokenizer(folder / "tokenizer.json").encode("a fox, 3 foxes")


def _captions(folder: Path) -> None:
    list_dataset(folder / "data")


def _options(name: str) -> Reader:
    config = TrainConfig(Path("m"), Path("d"), preview_prompt=("a", "b"), resolution=(256, 512), lr=1e-3)
    content = dump_options(config).encode() if name.endswith(".toml") else as_json(to_json(config))
    return Reader({name: content}, lambda folder: _config(folder / name))


def _config(path: Path) -> None:
    try:
        TrainConfig(**{"model_dir": "m", "dataset": "d"} | read_options(path, TrainConfig))
    except Exception as error:  # a value out of bounds names the option; the command line adds the file
        error.args = (f"{path}: {error}",)
        raise


def _run(folder: Path) -> None:
    run = RunFolder(folder / "x.safetensors")
    ones = Tensor.of(np.ones(3, np.float32))
    state = {"lora": {"a": ones}, "optimizer": {"m": ones}}
    facts = {"config": {"rank": 2}, "total": 9, "batch": 1, "dataset": "d", "model": {"vae": "v"}, "adapter": None,
             "environment": {"mlx": "0"}, "smoothed": None, "failures": 0}  # fmt: skip
    run.save(2, state, facts)  # type: ignore[arg-type]
    step = {"step": 1, "total": 9, "epoch": 1, "loss": 0.5, "smoothed": 0.5, "lr": 1e-4, "grad_norm": 1.0,
            "seconds": 0.5, "pictures": 1, "peak_memory": 10, "skipped": False}  # fmt: skip
    more = ({"step": 1, "validation": {"0.5": 1.0}}, {"step": 1, "preview": "a.png", "index": 0, "prompt": "x"})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in (step, *more, {**step, "step": 2})))


def _resumed(folder: Path) -> None:
    run = RunFolder(folder / "x.safetensors")
    run.unfinished()
    saved, faults = run.latest()
    if saved is None:  # a run that cannot go on says why, and leaves the state; here that counts as refused
        raise FormatError(*faults)
    page(run, read_lines(run), {}, {})


@cache
def _model_files() -> dict[str, bytes]:
    return written(lambda folder: tiny.write_model_folder(folder / "model"))


def _whole_model() -> Reader:
    files = _model_files()
    return Reader(files, _model, tuple(name for name in files if len(files[name]) < 50_000), share=0.3)


def _list(name: str) -> Reader:
    """Captions in one of the three ways."""
    lines = [json.dumps({"file_name": file, "text": text}) for file, text in (("sub/a.png", "a fox"), ("b.png", "b"))]
    lists = {
        "texts": {"data/sub/a.txt": "a fox é".encode(), "data/b.txt": b"\xef\xbb\xbfb\r\n"},
        "metadata.jsonl": {"data/metadata.jsonl": "\n".join(lines).encode()},
        "captions.json": {"data/captions.json": as_json({"sub/a.png": "a fox", "b.png": "b"})},
    }[name]
    (data,) = _picture("png").values()
    return Reader({"data/sub/a.png": data, "data/b.png": data, **lists}, _captions, tuple(lists))


CONTAINERS: dict[str, Make] = {
    "npz": _npz, "index": _index, "shards": _numbered, "packed": _packed,
    "safetensors": lambda f: safetensors.write(f / "a.safetensors", _tensors(), {"zimage": '{"a": [1]}'}),
    "burnpack": lambda f: foreign.write_burnpack(f / "a.bpk", ARRAYS),
    **({"gguf": lambda f: foreign.write_gguf(f / "a.gguf", ARRAYS)} if find_spec("gguf") else {}),
}  # fmt: skip
READERS: dict[str, Callable[[], Reader]] = {  # made when they are used
    **{name: partial(lambda make: Reader(written(make), _weights), make) for name, make in CONTAINERS.items()},
    **{
        f"LoRA {name}": partial(lambda name: Reader(_lora_files(name), _lora), name)
        for name in lora_makers.MAKERS
        if name != "npz"
    },
    **{f"record {s}": partial(lambda s: Reader(_picture(s, RECORD), _repeat), s) for s in ("png", "jpg", "webp")},
    **{
        f"picture {s}": partial(lambda s: Reader(_picture(s), lambda f: read_given(_only(f)), measured=False), s)
        for s in ("png", "jpg", "webp", "gif", "bmp", "tif")
    },
    "model": _whole_model,
    "tokenizer": lambda: Reader({"tokenizer.json": _model_files()["model/tokenizer/tokenizer.json"]}, _tokenizer),
    **{name: partial(_list, name) for name in ("texts", "metadata.jsonl", "captions.json")},
    **{name: partial(_options, name) for name in ("options.toml", "options.json")},
    "run": lambda: Reader(written(_run), _resumed),
    "cache": lambda: Reader(
        written(lambda f: write_entry(f / "e.safetensors", np.ones((3, 4), np.float32))),
        lambda folder: read_entry(folder / "e.safetensors"),
    ),
}
