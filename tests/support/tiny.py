"""Small random models in the official layout, and photograph-like pictures: real files without real weights.

Weights come from NumPy's legacy generator, whose stream never changes, seeded by each tensor's name: a golden file
needs to hold inputs and outputs only. Every name has its own scale, so that two swapped tensors of one shape show.
"""

from __future__ import annotations

import json
import zlib
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import Tensor
from zimage_ref.model import parameters
from zimage_ref.model.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from zimage_ref.training.dataset import Example, list_dataset

# Sizes differ along every axis, so that a swapped axis cannot pass
TRANSFORMER = TransformerConfig(
    dim=96, n_layers=2, n_refiner_layers=1, n_heads=3, in_channels=16, cap_feat_dim=40, patch_size=2, norm_eps=1e-5,
    rope_theta=256.0, t_scale=1000.0, axes_dims=(8, 14, 10), axes_lens=(640, 64, 64),
)  # fmt: skip
NARROW = TransformerConfig(
    dim=60, n_layers=1, n_refiner_layers=2, n_heads=5, in_channels=3, cap_feat_dim=28, patch_size=1, norm_eps=1e-3,
    rope_theta=100.0, t_scale=500.0, axes_dims=(4, 2, 6), axes_lens=(128, 32, 48),
)  # fmt: skip
WIDE = TransformerConfig(  # wider than the time embedding, as the real one
    dim=288, n_layers=1, n_refiner_layers=1, n_heads=2, in_channels=5, cap_feat_dim=36, patch_size=2, norm_eps=1e-6,
    rope_theta=256.0, t_scale=1000.0, axes_dims=(32, 48, 64), axes_lens=(256, 32, 32),
)  # fmt: skip
TRANSFORMERS = {"tiny": TRANSFORMER, "narrow": NARROW, "wide": WIDE}
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=330, hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=14, rms_norm_eps=1e-6, rope_theta=1_000_000,
)  # fmt: skip
TEXT_ENCODERS = {
    "tiny": TEXT_ENCODER,
    "odd": TextEncoderConfig(
        vocab_size=300, hidden_size=36, intermediate_size=44, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-3, rope_theta=10_000,
    ),
}  # fmt: skip
VAE = VAEConfig(
    in_channels=3, latent_channels=16, block_out_channels=(8, 12, 16, 20), layers_per_block=2, norm_num_groups=4,
    scaling_factor=0.3611, shift_factor=0.1159,
)  # fmt: skip
VAES = {
    "tiny": VAE,
    "odd": VAEConfig(
        in_channels=3, latent_channels=6, block_out_channels=(6, 9, 12), layers_per_block=1, norm_num_groups=3,
        scaling_factor=0.7, shift_factor=-0.3,
    ),
}  # fmt: skip
SCHEDULER = SchedulerConfig(shift=3.0)


def random_weights(shapes: parameters.Shapes, salt: str = "") -> dict[str, np.ndarray]:
    """float32 weights that keep activations near 1: Linear and Conv scaled by fan-in, norms near 1."""
    return {name: _random_weight(name, tuple(shape), salt).copy() for name, shape in shapes.items()}


@lru_cache(2000)  # several small models
def _random_weight(name: str, shape: tuple[int, ...], salt: str) -> np.ndarray:
    rng = np.random.RandomState(zlib.crc32((salt + name).encode()))
    scale = 0.5 + rng.uniform()
    values = rng.standard_normal(shape)
    if ("norm" in name and name.endswith("weight")) or name == "cap_embedder.0.weight":
        values = 1 + 0.2 * values
    elif len(shape) > 1 and "token" not in name:
        values = values * scale / np.sqrt(prod(shape[1:]))
    else:
        values = values * scale * 0.3
    return values.astype(np.float32)


def write_model_folder(folder: Path, dtype: str = "f32", scheduler: SchedulerConfig = SCHEDULER) -> Path:
    """A whole model in the official Hugging Face layout, every tensor of the official file lists included."""
    parts = {
        "transformer": (parameters.transformer_parameters(TRANSFORMER), TRANSFORMER, "diffusion_pytorch_model"),
        "text_encoder": (parameters.text_encoder_parameters(TEXT_ENCODER), TEXT_ENCODER, "model"),
        "vae": (parameters.vae_parameters(VAE), VAE, "diffusion_pytorch_model"),
    }
    for part, (shapes, config, stem) in parts.items():
        tensors = {k: Tensor.of(v).cast(dtype) for k, v in random_weights(shapes, part).items()}
        safetensors.write(folder / part / f"{stem}.safetensors", tensors, {"format": "pt"})
        _write_json(folder / part / "config.json", config.to_json())
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler.to_json())
    _write_json(folder / "model_index.json", _MODEL_INDEX)
    write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer with Qwen's chat tokens and template, in every file that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_ENCODER.vocab_size - len(_CHAT_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _CHAT_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>", "bos_token": None, "unk_token": None, "errors": "replace",
            "add_prefix_space": False, "add_bos_token": False, "chat_template": _CHAT_TEMPLATE,
        },
    )  # fmt: skip
    return folder / "tokenizer.json"


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """A smooth, coloured, noisy picture, different for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(x * rng.uniform(2, 12) + y * rng.uniform(2, 12) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = np.stack(waves, -1) * 90 + 128 + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_dataset(folder: Path) -> Path:
    """PNG, JPEG and WEBP pictures of different sizes, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (suffix, size) in enumerate(
        {".png": (70, 50), ".jpg": (64, 96), ".webp": (81, 81), ".jpeg": (40, 33)}.items()
    ):
        photograph(*size, seed=i).save(folder / f"photo{i}{suffix}")
        (folder / f"photo{i}.txt").write_text(
            f"sks picture number {i}, of soft waves{' and more' * i}\n", encoding="utf-8"
        )
    return folder


def read_dataset(folder: Path) -> list[Example]:
    """All examples of `folder`, each opened."""
    return [Example.open(picture, caption) for picture, caption in list_dataset(folder)]


def _write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


_TEXT = "a picture of soft waves and a red fox in the snow, the number of more pictures, user assistant"
_CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
_MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.36.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
