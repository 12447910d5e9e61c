"""Checkpoints as other programs write them, made here from the formats' descriptions, not with the readers' code."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zimage_ref.checkpoints.registry import COMPONENTS, model_parts
from zimage_ref.formats import npz, safetensors
from zimage_ref.formats.tensors import BFLOAT16, Tensor

# component -> dialect's name -> dialect
DIALECTS = {name: {d.name: d for d in component.dialects} for name, component in model_parts().items()}
_BURN_DTYPES = {"<f4": "F32", "<f2": "F16", "|V2": "BF16", "<f8": "F64", "<i4": "I32", "|u1": "U8"}


def official(model: Path, component: str) -> dict[str, np.ndarray]:
    """Every weight of a component of a model in the official layout."""
    (file,) = (model / component).glob("*.safetensors")
    return {name: tensor.read() for name, tensor in safetensors.read(file)[0].items()}


def in_dialect(arrays: Mapping[str, np.ndarray], component: str, dialect: str, config: Any) -> dict[str, np.ndarray]:
    """The weights under a dialect's names and layout."""
    tensors = {name: Tensor.of(arrays[name]) for name in COMPONENTS[component].parameters(config)}
    written = DIALECTS[component][dialect].write(tensors, config)
    return {name: np.ascontiguousarray(tensor.read()).reshape(tensor.shape) for name, tensor in written.items()}


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """The arrays in the container that the suffix names; `.legacy.bpk` is burnpack of before December 2025."""
    tensors = {name: Tensor.of(array) for name, array in arrays.items()}
    if path.suffix == ".npz":
        npz.write(path, tensors)
    elif path.suffix == ".bpk":
        write_burnpack(path, arrays, aligned=not path.name.endswith(".legacy.bpk"))
    elif path.suffix == ".gguf":
        write_gguf(path, arrays)
    else:
        safetensors.write(path, tensors)
    return path


def write_burnpack(path: Path, arrays: Mapping[str, np.ndarray], aligned: bool = True, **entries: Any) -> None:
    """A burnpack file; `entries` replace or add to the metadata's root."""
    step, position, tensors, data = 256 if aligned else 1, 0, {}, b""
    for name, array in sorted(arrays.items()):
        position = -(-len(data) // step) * step
        data += b"\0" * (position - len(data)) + array.tobytes()
        tensors[name] = {
            "dtype": _BURN_DTYPES[array.dtype.str], "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes], "param_id": 7,
        }  # fmt: skip
    metadata = cbor({"metadata": {"format": "burnpack"}, "tensors": tensors} | entries)
    head = b"NRUB" + struct.pack("<HI", 1, len(metadata)) + metadata
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + b"\0" * (-len(head) % step) + data)


def cbor(value: Any) -> bytes:
    """CBOR of definite lengths (RFC 8949)."""
    if isinstance(value, int):
        return _head(0, value)
    if isinstance(value, str):
        return _head(3, len(value.encode())) + value.encode()
    if isinstance(value, list):
        return _head(4, len(value)) + b"".join(map(cbor, value))
    return _head(5, len(value)) + b"".join(cbor(k) + cbor(v) for k, v in value.items())


def _head(major: int, argument: int) -> bytes:
    for info, code, limit in ((24, ">B", 1 << 8), (25, ">H", 1 << 16), (26, ">I", 1 << 32), (27, ">Q", 1 << 64)):
        if argument < 24:
            return bytes([major << 5 | argument])
        if argument < limit:
            return bytes([major << 5 | info]) + struct.pack(code, argument)
    raise AssertionError(argument)


def write_gguf(path: Path, arrays: Mapping[str, np.ndarray], kind: Any = None, architecture: str = "lumina2") -> None:
    """A GGUF file by llama.cpp's own writer; `kind` is the quantized type of matrices whose rows allow it."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(300)])  # long, as a vocabulary
    for name, array in arrays.items():
        block = gguf.GGML_QUANT_SIZES[kind][0] if kind is not None else 1
        if kind is not None and array.ndim == 2 and array.shape[1] % block == 0:
            writer.add_tensor(name, gguf.quants.quantize(array.astype(np.float32), kind), raw_dtype=kind)
        elif array.dtype == BFLOAT16:
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
