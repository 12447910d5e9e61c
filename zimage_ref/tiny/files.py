"""Writes the files of the tiny model: weights with configs, a tokenizer for its captions, the index and README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from zimage_ref.checkpoints.component import CONFIG_FILE
from zimage_ref.checkpoints.registry import COMPONENTS
from zimage_ref.formats import safetensors
from zimage_ref.formats.files import atomic_write
from zimage_ref.formats.json_file import write_json
from zimage_ref.formats.tensors import Array, Tensor
from zimage_ref.model.config import SchedulerConfig
from zimage_ref.model.config_reader import Config

_CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WORDS = (  # from Qwen's tokenizer: it splits a text before bytes are merged into tokens
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (  # Qwen's template, reduced to plain messages with thinking enabled
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_PIPELINE = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.36.0",  # the first version with this pipeline
}
_LIBRARIES = {  # for the parts that are not networks
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
}

_CARD = """\
# Tiny Z-Image

A small Z-Image, trained from scratch by `python -m zimage_mlx.tiny` on pictures that `zimage_ref.tiny.drawings` draws:
one to three coloured shapes on a plain background, 128 x 128, with captions such as "a small red circle left of a blue
square on a yellow background". It knows eight shapes and ten colours, and draws nothing else.

It is a base model, not a distilled one: guidance 3 makes it follow captions more closely. 8 steps are enough for it.

Seen in training: {pictures:,} pictures by the autoencoder, {latents:,} by text encoder and transformer. Of captions
whose combination of shape, colour and background was never seen, it drew exactly what they say:

{shares}

`tests/bench/tiny_quality.py` measures more of them.
"""


def write_card(folder: Path, pictures: int, latents: int, shares: Mapping[str, float]) -> None:
    """Writes README.md: how the model was made, and what it can do."""
    lines = "\n".join(f"- {name}: {share:.1%}" for name, share in shares.items())
    with atomic_write(folder / "README.md") as file:
        file.write(_CARD.format(pictures=pictures, latents=latents, shares=lines).encode())


def write_component(model: Path, name: str, config: Config, weights: Mapping[str, Array]) -> None:
    """Writes config and bfloat16 weights of the component `name` into the folder `model`, in the official layout."""
    folder, file = model / name, f"{COMPONENTS[name].stem}.safetensors"
    tensors = {key: Tensor.of(weights[key]).cast("bf16") for key in sorted(weights)}
    safetensors.write(folder / file, tensors, {"format": "pt"})
    write_json(folder / CONFIG_FILE, config.to_json())


def write_surroundings(folder: Path, captions: Sequence[str], vocab_size: int, scheduler: SchedulerConfig) -> None:
    """Writes the parts that are not networks: index, scheduler and tokenizer."""
    networks = {name: component.library for name, component in COMPONENTS.items() if not component.optional}
    write_json(folder / "model_index.json", _PIPELINE | dict(sorted((_LIBRARIES | networks).items())))
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler.to_json())
    write_tokenizer(folder / "tokenizer", captions, vocab_size)


def write_tokenizer(folder: Path, captions: Sequence[str], vocab_size: int) -> None:
    """Writes a byte-level BPE tokenizer with Qwen's chat tokens and template. Words of `captions` are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_CHAT_TOKENS), min_frequency=max(len(captions) // 500, 2), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(["user\nassistant\n"] * len(captions) + list(captions), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _CHAT_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    tokenizer.model.save(str(folder))  # writes vocab.json and merges.txt
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>", "bos_token": None, "unk_token": None, "errors": "replace",
            "add_prefix_space": False, "add_bos_token": False, "chat_template": _CHAT_TEMPLATE,
        },
    )  # fmt: skip
