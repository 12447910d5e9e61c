"""Layers in quantized layouts of other programs, made by their writers' rules, not with the readers' code.

A maker takes a matrix (out, in). It gives its tensors by suffix, {suffix: (safetensors tag, array)}, and the float32
weights that the writer's own program computes from them. Sources: ComfyUI's quant_ops.py and comfy-kitchen.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Stored = dict[str, tuple[str, np.ndarray]]
Made = tuple[Stored, np.ndarray]


def _value_e4m3(code: int) -> float:
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


GRID = np.array([_value_e4m3(code) for code in range(127)])
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(values: np.ndarray, grid: np.ndarray, sign_bit: int) -> np.ndarray:
    """The codes of the grid values nearest to `values`."""
    index = np.abs(np.abs(values)[..., None] - grid).argmin(-1)
    return (index | np.signbit(values) * sign_bit).astype(np.uint8)


def e4m3(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and their values in float32."""
    codes = nearest(values, GRID, 128)
    return codes, (GRID[codes & 127] * np.where(codes & 128, -1, 1)).astype(np.float32)


def _note(**options: object) -> tuple[str, np.ndarray]:
    return "U8", np.frombuffer(json.dumps(options).encode(), np.uint8)


def fp8(weight: np.ndarray) -> Made:
    scale = np.float32(np.abs(weight).max() / 448)
    codes, values = e4m3(weight / scale)
    return {"weight": ("F8_E4M3", codes), "weight_scale": ("F32", scale.reshape(()))}, values * scale


def fp8_rows(weight: np.ndarray) -> Made:
    scale = (np.abs(weight).max(1, keepdims=True) / 448).astype(np.float32)
    codes, values = e4m3(weight / scale)
    return {"weight": ("F8_E4M3", codes), "scale_weight": ("F32", scale), "scale_input": ("F32", np.ones(1, "<f4"))}, (
        values * scale
    )


def fp8_blocks(weight: np.ndarray) -> Made:
    blocks = weight.reshape(len(weight), -1, 8)
    scale = (np.abs(blocks).max(2, keepdims=True) / 448).astype(np.float32)  # (out, blocks, 1), as musubi
    codes, values = e4m3(blocks / scale)
    stored: Stored = {"weight": ("F8_E4M3", codes.reshape(weight.shape)), "scale_weight": ("F32", scale)}
    return stored, (values * scale).reshape(weight.shape)


def e5m2_plain(weight: np.ndarray) -> Made:
    upper = (weight.astype("<f2").view("<u2") >> 8).astype(np.uint8)
    return {"weight": ("F8_E5M2", upper)}, (upper.astype("<u2") << 8).view("<f2").astype(np.float32)


def e4m3_plain(weight: np.ndarray) -> Made:
    codes, values = e4m3(weight)
    return {"weight": ("F8_E4M3", codes)}, values


def _padded(weight: np.ndarray, multiple: int) -> np.ndarray:
    rows, columns = (-n % multiple for n in weight.shape)
    return np.pad(weight, ((0, rows), (0, columns)))


def tiled(scale: np.ndarray) -> np.ndarray:
    """cuBLAS's order of scales: in a tile of 128 x 4, row r and column c stand at (r % 32) * 16 + r // 32 * 4 + c."""
    rows, columns = -(-scale.shape[0] // 128), -(-scale.shape[1] // 4)
    out = np.zeros((rows, columns, 512), scale.dtype)
    for (r, c), value in np.ndenumerate(scale):
        out[r // 128, c // 4, r % 128 % 32 * 16 + r % 128 // 32 * 4 + c % 4] = value
    return out.reshape(rows * 128, columns * 4)


def mxfp8(weight: np.ndarray) -> Made:
    whole = _padded(weight, 32).reshape(-1, _padded(weight, 32).shape[1] // 32, 32)
    exponent = np.ceil(np.log2(np.maximum(np.abs(whole).max(2), 1e-30) / 448)).clip(-127, 127)
    codes, values = e4m3(whole / np.exp2(exponent)[..., None])
    weights = (values * np.exp2(exponent)[..., None]).reshape(len(whole), -1).astype(np.float32)
    stored: Stored = {
        "weight": ("F8_E4M3", codes.reshape(len(whole), -1)),
        "weight_scale": ("F8_E8M0", tiled((exponent + 127).astype(np.uint8))),
        "comfy_quant": _note(format="mxfp8"),
    }
    return stored, weights[: weight.shape[0], : weight.shape[1]]


def nvfp4(weight: np.ndarray) -> Made:
    whole = _padded(weight, 16)
    groups = whole.reshape(len(whole), -1, 16)
    second = np.float32(np.abs(weight).max() / (448 * 6))
    scale_codes, scale = e4m3(np.abs(groups).max(2) / 6 / second)
    step = np.where(scale, scale * second, 1)[..., None]
    codes = nearest(groups / step, FP4, 8).reshape(len(whole), -1)
    values = (FP4[codes & 7] * np.where(codes & 8, -1, 1)).reshape(groups.shape) * (scale * second)[..., None]
    stored: Stored = {
        "weight": ("U8", codes[:, ::2] << 4 | codes[:, 1::2]),
        "weight_scale": ("F8_E4M3", tiled(scale_codes)),
        "weight_scale_2": ("F32", second.reshape(())),
        "comfy_quant": _note(format="nvfp4"),
    }
    return stored, values.reshape(whole.shape)[: weight.shape[0], : weight.shape[1]].astype(np.float32)


def rotation(size: int) -> np.ndarray:
    """The regular Hadamard matrix, by its recursion."""
    step = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    return step if size == 4 else np.kron(rotation(size // 4), step)


def _rotated(weight: np.ndarray, size: int) -> np.ndarray:
    return (weight.reshape(len(weight), -1, size) @ (rotation(size) / np.sqrt(size))).reshape(weight.shape)


def int8(weight: np.ndarray) -> Made:
    scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    q = np.rint(weight / scale).astype(np.int8)
    note = _note(format="int8_tensorwise")
    return {"weight": ("I8", q), "weight_scale": ("F32", scale), "comfy_quant": note}, q * scale


def int8_convrot(weight: np.ndarray) -> Made:
    stored, values = int8(_rotated(weight, 16))
    note = _note(format="int8_tensorwise", params={"convrot": True, "convrot_groupsize": 16})
    return stored | {"comfy_quant": note}, _rotated(values, 16).astype(np.float32)


def w4a4(weight: np.ndarray) -> Made:
    turned = _rotated(weight, 16)
    scale = (np.abs(turned).max(1) / 7).astype(np.float32)
    q = np.rint(turned / scale[:, None]).astype(np.int64)
    stored: Stored = {
        "weight": ("I8", ((q[:, 1::2] & 15) << 4 | q[:, ::2] & 15).astype(np.uint8).view(np.int8)),
        "weight_scale": ("F32", scale),
        "comfy_quant": _note(format="convrot_w4a4", convrot_groupsize=16),
    }
    return stored, _rotated(q * scale[:, None], 16).astype(np.float32)


def w4a8(weight: np.ndarray) -> Made:
    turned = _rotated(weight, 16)
    channel = (np.abs(turned).max(1) / 127).astype(np.float32)
    groups = (turned / channel[:, None]).reshape(len(weight), -1, 16)
    codes, relative = e4m3(np.abs(groups).max(2) / 7)
    n = np.clip(np.rint(groups / np.maximum(relative, 1e-9)[..., None]), -8, 7)
    values = np.clip(np.rint(n * relative[..., None]), -127, 127).reshape(weight.shape) * channel[:, None]
    q = (n.reshape(weight.shape) + 8).astype(np.uint8)
    stored: Stored = {
        "weight": ("I8", (q[:, 1::2] << 4 | q[:, ::2]).view(np.int8)),
        "weight_s_rel": ("F8_E4M3", codes),
        "weight_s_channel": ("F32", channel),
        "comfy_quant": _note(format="asym_w4a8_int8", convrot_groupsize=16, group_size=16),
    }
    return stored, _rotated(values, 16).astype(np.float32)


def awq(weight: np.ndarray) -> Made:
    groups = weight.reshape(len(weight), -1, 16)
    zero = groups.mean(2).astype("<f2").astype(np.float32)
    scale = (np.abs(groups - zero[..., None]).max(2) / 7).astype("<f2").astype(np.float32)
    n = np.clip(np.rint((groups - zero[..., None]) / scale[..., None]), -8, 7)
    q = (n.reshape(weight.shape) + 8).astype(np.uint8)
    stored: Stored = {
        "weight": ("I8", (q[:, 1::2] << 4 | q[:, ::2]).view(np.int8)),
        "weight_scale": ("F16", np.ascontiguousarray(scale.T).astype("<f2")),
        "weight_zeros": ("F16", np.ascontiguousarray(zero.T).astype("<f2")),
    }
    return stored, (n * scale[..., None] + zero[..., None]).reshape(weight.shape).astype(np.float32)


MAKERS: dict[str, Callable[[np.ndarray], Made]] = {
    "e4m3_plain": e4m3_plain, "e5m2_plain": e5m2_plain, "fp8": fp8, "fp8_rows": fp8_rows, "fp8_blocks": fp8_blocks,
    "mxfp8": mxfp8, "nvfp4": nvfp4, "int8": int8, "int8_convrot": int8_convrot, "w4a4": w4a4, "w4a8": w4a8, "awq": awq,
}  # fmt: skip


def quantized(
    arrays: Mapping[str, np.ndarray], chosen: Callable[[str], bool], maker: str
) -> tuple[Stored, dict[str, np.ndarray]]:
    """The tensors of a file with the chosen matrices quantized, and the weights that they stand for."""
    stored: Stored = {}
    weights: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array.ndim == 2 and chosen(name):
            parts, weights[name] = MAKERS[maker](array)
            stored |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
        else:
            stored[name], weights[name] = ("F32", array), array
    return stored, weights


def write(path: Path, stored: Stored, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of tensors with any tag."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, (tag, array) in stored.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
