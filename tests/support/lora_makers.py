"""LoRA files as other tools write them: one small function per dialect, made from that tool's published rules alone.

Every maker takes {layer: (A, B)} with official layer names, A (rank, in), B (out, rank), the rank's alpha and the
base weights, and writes a file that means W + alpha / rank B A. In every block q, k and v share their A, so that the
dialects which can only say that can take part. Nothing here imports the product.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
Maker = Callable[[Path, Factors, float, Mapping[str, np.ndarray]], None]
Weights = Mapping[str, np.ndarray]


def factors(layers: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0, size: float = 0.6) -> Factors:
    """Random factors for layers of (out, in); q, k and v of a block share A."""
    rng, found = np.random.default_rng(seed), {}
    for layer, (outputs, inputs) in layers.items():
        A = rng.standard_normal((rank, inputs)).astype(np.float32) / np.sqrt(inputs)
        if layer.endswith((".to_k", ".to_v")):
            A = found[layer[:-1] + "q"][0]
        found[layer] = (A.astype(np.float32), (size * rng.standard_normal((outputs, rank))).astype(np.float32))
    return found


def comfy(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """ai-toolkit: no alpha, because it is forced to the rank."""
    tensors = {}
    for layer, (A, B) in lora.items():
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = A
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = B * np.float32(alpha / len(A))
    save_file(tensors, path)


def comfy_checkpoint_prefix(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """The same under the prefix of all-in-one checkpoints."""
    tensors = {}
    for layer, (A, B) in lora.items():
        tensors[f"model.diffusion_model.{layer}.lora_A.weight"] = A * np.float32(alpha / len(A))
        tensors[f"model.diffusion_model.{layer}.lora_B.weight"] = B
    save_file(tensors, path)


def diffusers(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """save_lora_weights of diffusers: PEFT's config of the transformer, as JSON in the metadata."""
    tensors, rank = {}, 0
    for layer, (A, B) in lora.items():
        rank = len(A)
        tensors[f"transformer.{layer}.lora_A.weight"] = A
        tensors[f"transformer.{layer}.lora_B.weight"] = B
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(lora), "use_rslora": False}
    config = {f"transformer.{key}": value for key, value in config.items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})


def kohya(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """musubi-tuner: underscores, alpha keys."""
    tensors = {}
    for layer, (A, B) in lora.items():
        name = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": np.float32(alpha)}
    save_file({k: np.asarray(v) for k, v in tensors.items()}, path)


def kohya_fused(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """musubi-tuner converted for ComfyUI: qkv of three times the rank, block-diagonal, three times the alpha."""
    tensors = {}
    for layer, (A, B) in lora.items():
        block, _, part = layer.rpartition(".attention.to_")
        if block and part in ("k", "v"):
            continue
        name = "lora_unet_" + layer.replace(".", "_")
        if block and part == "q":
            name = "lora_unet_" + f"{block}.attention.qkv".replace(".", "_")
            (Aq, Bq), (Ak, Bk), (Av, Bv) = (lora[f"{block}.attention.to_{p}"] for p in "qkv")
            rank, height = len(Aq), len(Bq)
            B = np.zeros((3 * height, 3 * rank), np.float32)
            B[:height, :rank], B[height : 2 * height, rank : 2 * rank], B[2 * height :, 2 * rank :] = Bq, Bk, Bv
            A, scaled = np.concatenate([Aq, Ak, Av]), np.float32(3 * alpha)
        else:
            scaled = np.float32(alpha)
            name = name.replace("_to_out_0", "_out")
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": np.asarray(scaled)}
    save_file(tensors, path)


def kohya_native(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """A trainer in sd-scripts' style on ComfyUI's module tree: one A for qkv."""
    tensors = {}
    for layer, (A, B) in _shared(lora).items():
        name = "lora_unet_" + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        tensors[f"{name}.alpha"] = np.asarray(np.float32(alpha))
    save_file(tensors, path)


def peft_native(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """A PEFT trainer on ComfyUI's module tree."""
    tensors = {}
    for layer, (A, B) in _shared(lora).items():
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = A
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = B * np.float32(alpha / len(A))
    save_file(tensors, path)


def diffsynth(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """DiffSynth-Studio: no prefix, the adapter's name, alpha = rank."""
    tensors = {}
    for layer, (A, B) in lora.items():
        tensors[f"{layer}.lora_A.default.weight"] = A
        tensors[f"{layer}.lora_B.default.weight"] = B * np.float32(alpha / len(A))
    save_file(tensors, path)


def onetrainer(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """OneTrainer's legacy format: the names of diffusers with kohya's suffixes."""
    tensors = {}
    for layer, (A, B) in lora.items():
        tensors[f"transformer.{layer}.lora_down.weight"] = A
        tensors[f"transformer.{layer}.lora_up.weight"] = B
        tensors[f"transformer.{layer}.alpha"] = np.asarray(np.float32(alpha))
    save_file(tensors, path)


def onetrainer_dora(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """OneTrainer with DoRA: a magnitude for each output, here the norm that W + s B A has anyway."""
    tensors = {}
    for layer, (A, B) in lora.items():
        changed = base[f"{layer}.weight"] + alpha / len(A) * B @ A
        tensors[f"transformer.{layer}.lora_down.weight"] = A
        tensors[f"transformer.{layer}.lora_up.weight"] = B
        tensors[f"transformer.{layer}.alpha"] = np.asarray(np.float32(alpha))
        tensors[f"transformer.{layer}.dora_scale"] = np.linalg.norm(changed, axis=1, keepdims=True).astype(np.float32)
    save_file(tensors, path)


def lycoris_dora(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """LyCORIS with wd_on_output off: a magnitude for each input."""
    tensors = {}
    for layer, (A, B) in lora.items():
        name = "lycoris_" + layer.replace(".", "_")
        changed = base[f"{layer}.weight"] + alpha / len(A) * B @ A
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        tensors[f"{name}.alpha"] = np.asarray(np.float32(alpha))
        tensors[f"{name}.dora_scale"] = np.linalg.norm(changed, axis=0, keepdims=True).astype(np.float32)
    save_file(tensors, path)


def peft_dora(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """PEFT with use_dora, saved by itself: magnitudes as vectors."""
    tensors, rank = {}, 0
    for layer, (A, B) in lora.items():
        rank = len(A)
        changed = base[f"{layer}.weight"] + alpha / rank * B @ A
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B
        tensors[f"base_model.model.{layer}.lora_magnitude_vector"] = np.linalg.norm(changed, axis=1).astype(np.float32)
    save_file(tensors, path)
    _write_json(path.with_name("adapter_config.json"), {"r": rank, "lora_alpha": alpha, "use_dora": True})


def lokr(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """ai-toolkit's LoKr with a decomposed second factor: alpha / dim counts."""
    tensors = {}
    for layer, (A, B) in lora.items():
        name = f"diffusion_model.{layer}"
        tensors |= {f"{name}.lokr_w1": np.ones((1, 1), np.float32), f"{name}.lokr_w2_a": B, f"{name}.lokr_w2_b": A}
        tensors[f"{name}.alpha"] = np.asarray(np.float32(alpha))
    save_file(tensors, path)


def lokr_full(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """LyCORIS's LoKr with two whole matrices: its alpha, which may be absurd, does not count."""
    tensors = {}
    for layer, (A, B) in lora.items():
        name = "lycoris_" + layer.replace(".", "_")
        product = B @ A * np.float32(alpha / len(A))
        tensors |= {f"{name}.lokr_w1": np.full((1, 1), 2, np.float32), f"{name}.lokr_w2": product / 2}
        tensors[f"{name}.alpha"] = np.asarray(np.float32(1e10))
    save_file(tensors, path)


def loha(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """musubi-tuner's LoHa: the product of two products, here with one that is 1 everywhere."""
    tensors = {}
    for layer, (A, B) in lora.items():
        name, rank = "lora_unet_" + layer.replace(".", "_"), len(A)
        tensors |= {f"{name}.hada_w1_a": B, f"{name}.hada_w1_b": A}
        tensors[f"{name}.hada_w2_a"] = np.full_like(B, 1 / rank)
        tensors[f"{name}.hada_w2_b"] = np.ones_like(A)
        tensors[f"{name}.alpha"] = np.asarray(np.float32(alpha))
    save_file(tensors, path)


def anime_z(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """Dots everywhere, and beside the split layers the fused ones again (diffusers #13203)."""
    tensors = {}
    for layer, (A, B) in lora.items():
        dotted = layer.replace(".to_q", ".to.q").replace(".to_k", ".to.k").replace(".to_v", ".to.v")
        tensors |= {f"{dotted}.lora.down.weight": A, f"{dotted}.lora.up.weight": B}
        tensors[f"{layer}.alpha"] = np.asarray(np.float32(alpha))
    for layer, (A, B) in _shared(lora).items():
        if layer.endswith((".qkv", ".out")):
            tensors |= {f"{layer}.lora.down.weight": A, f"{layer}.lora.up.weight": B}
        if layer.endswith(".qkv"):
            tensors[f"{layer}.alpha"] = np.asarray(np.float32(alpha))
    save_file(tensors, path)


def peft(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """save_pretrained of PEFT: alpha in adapter_config.json."""
    tensors, rank = {}, 0
    for layer, (A, B) in lora.items():
        rank = len(A)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B
    save_file(tensors, path)
    _write_json(path.with_name("adapter_config.json"), {"peft_type": "LORA", "r": rank, "lora_alpha": alpha})


def peft_saved(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """PEFT with every layer in modules_to_save: the changed weights themselves."""
    tensors = {}
    for layer, (A, B) in lora.items():
        tensors[f"base_model.model.{layer}.weight"] = base[f"{layer}.weight"] + B @ A * np.float32(alpha / len(A))
    save_file(tensors, path)


def video_x_fun(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """VideoX-Fun: kohya's keys with two underscores after the prefix."""
    tensors = {}
    for layer, (A, B) in lora.items():
        name = "lora_unet__" + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        tensors[f"{name}.alpha"] = np.asarray(np.float32(alpha))
    save_file(tensors, path)


def full_difference(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """ai-toolkit's all_layers: what is added, whole."""
    save_file(
        {f"diffusion_model.{layer}.diff": B @ A * np.float32(alpha / len(A)) for layer, (A, B) in lora.items()}, path
    )


def burn(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """z-image-train: fused qkv, no suffix, alpha in the sidecar."""
    tensors, rank = {}, 0
    for layer, (A, B) in _shared(lora).items():
        rank, name = len(A), layer.replace(".attention.out", ".attention.to_out")
        tensors |= {f"{name}.lora_a": A, f"{name}.lora_b": B}
    save_file(tensors, path)
    sidecar = {
        "rank": rank, "alpha": alpha, "target_attention": True, "target_feed_forward": True, "target_refiners": True,
    }  # fmt: skip
    _write_json(path.with_suffix(".lora.json"), sidecar)


def npz(path: Path, lora: Factors, alpha: float, base: Weights) -> None:
    """The default dialect in NumPy's container."""
    tensors = {}
    for layer, (A, B) in lora.items():
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = A
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = B * np.float32(alpha / len(A))
    with path.open("wb") as file:
        np.savez(file, **tensors)


MAKERS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        comfy, comfy_checkpoint_prefix, diffusers, kohya, kohya_fused, kohya_native, peft_native, diffsynth, onetrainer,
        onetrainer_dora, lycoris_dora, peft_dora, lokr, lokr_full, loha, anime_z, peft, peft_saved, full_difference,
        burn, npz, video_x_fun,
    )
}  # fmt: skip


def _shared(lora: Factors) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """On ComfyUI's module tree: qkv with their one A, `out` for to_out.0."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for layer, (A, B) in lora.items():
        block, _, part = layer.rpartition(".attention.to_")
        if not block:
            found[layer] = (A, B)
        elif part == "out.0":
            found[f"{block}.attention.out"] = (A, B)
        elif part == "q":
            Bs = [lora[f"{block}.attention.to_{p}"][1] for p in "qkv"]
            found[f"{block}.attention.qkv"] = (A, np.concatenate(Bs))
    return found


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
