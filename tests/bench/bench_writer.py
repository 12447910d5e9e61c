"""Tokens a second that the text encoder writes, beside mlx-lm with the same weights if it is installed.

    python tests/bench/bench_writer.py                                  # Qwen3-4B on a GPU, in bfloat16 and 4 bits
    python tests/bench/bench_writer.py --layers 6 --vocabulary 16384    # fewer layers, for a CPU: in float32

Random weights. Both programs take the most likely token, in turns. One JSON line a precision.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice, repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from zimage_mlx.device import on_gpu
from zimage_mlx.networks.text_encoder import TextEncoder
from zimage_mlx.networks.writer import Ending, Writer
from zimage_ref.model.config import OFFICIAL_TEXT_ENCODER, TextEncoderConfig

Parts = tuple[TextEncoder, Ending]
Start = Callable[[], Iterator[int]]  # begins a text: the tokens that follow the prompt


def parts(config: TextEncoderConfig, dtype: mx.Dtype, bits: int | None) -> Parts:
    """The networks of a writer, with random weights. bits: of the matrices of the layers; the embedding stays whole."""
    both = TextEncoder(config), Ending(config, has_head=False)
    for part in both:
        part.update(
            tree_map(lambda p: (mx.random.normal(p.shape) * p.shape[-1] ** -0.5).astype(dtype), part.parameters())
        )
        if bits:
            nn.quantize(part, bits=bits, class_predicate=lambda _, module: isinstance(module, nn.Linear))
        mx.eval(part.parameters())
    return both


def ours(both: Parts, prompt: Sequence[int]) -> Iterator[int]:
    """The tokens of this project."""
    return Writer(*both).tokens(prompt, repeat(0.0))


def theirs(config: TextEncoderConfig, both: Parts, bits: int | None) -> Callable[[Sequence[int]], Iterator[int]] | None:
    """The same of mlx-lm on the same arrays; None if it is not installed."""
    try:
        qwen3: Any = importlib.import_module("mlx_lm.models.qwen3")
        step: Any = importlib.import_module("mlx_lm.generate").generate_step
    except ImportError:
        return None
    known = {**asdict(config), "model_type": "qwen3", "max_position_embeddings": 40960, "tie_word_embeddings": True}
    model = qwen3.Model(qwen3.ModelArgs(**known))
    if bits:
        nn.quantize(model, bits=bits, class_predicate=lambda _, module: isinstance(module, nn.Linear))
    encoder, ending = (tree_flatten(part.parameters()) for part in both)
    last = f"model.layers.{config.used_layers}."
    model.load_weights(encoder + [(_official(name, last), array) for name, array in ending])
    return lambda prompt: (token for token, _ in step(mx.array(list(prompt)), model, max_tokens=-1))


def _official(name: str, last: str) -> str:
    return name.replace("layer.", last, 1) if name.startswith("layer.") else f"model.{name}"


def measured(start: Start, count: int) -> tuple[float, float, list[int]]:
    """Seconds and processor seconds for each token after the first, which the prompt takes; and all tokens."""
    text = start()
    first = next(text)
    begun, busy = time.perf_counter(), time.process_time()
    rest = list(islice(text, count - 1))
    seconds, processor = time.perf_counter() - begun, time.process_time() - busy
    return seconds / (count - 1), processor / (count - 1), [first, *rest]


def compare(
    config: TextEncoderConfig, dtype: mx.Dtype, bits: int | None, args: argparse.Namespace
) -> dict[str, object]:
    """Both programs in turns; the best turn of each."""
    both, prompt = parts(config, dtype, bits), [i * 37 % config.vocab_size for i in range(args.prompt)]
    starts: dict[str, Start] = {"ours": partial(ours, both, prompt)}
    if (peer := theirs(config, both, bits)) is not None:
        starts["mlx-lm"] = partial(peer, prompt)
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    processor: dict[str, list[float]] = {name: [] for name in starts}
    texts: dict[str, list[int]] = {}
    for turn in range(args.turns + 1):
        for name, start in starts.items():
            wall, busy, texts[name] = measured(start, args.tokens)
            seconds[name] += [wall] if turn else []  # the first warms up
            processor[name] += [busy] if turn else []
    row: dict[str, object] = {"weights": f"{bits} bits" if bits else str(dtype).removeprefix("mlx.core.")}
    best = {name: (min(seconds[name]), min(processor[name])) for name in starts}  # other work only makes it slower
    for name, (wall, busy) in best.items():
        row[f"{name} tokens/s"] = round(1 / wall, 2)
        row[f"{name} processor s/token"] = round(busy, 4)
    if "mlx-lm" in best:
        (wall, busy), (peer_wall, peer_busy) = best["ours"], best["mlx-lm"]
        row["of mlx-lm"] = round(peer_wall / wall, 3)
        row["of mlx-lm by processor time"] = round(peer_busy / busy, 3)
        row["same tokens"] = texts["ours"] == texts["mlx-lm"]
    return row


def main() -> None:
    """Measures each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 36), ("vocabulary", 151936), ("tokens", 64), ("prompt", 128), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    config = replace(OFFICIAL_TEXT_ENCODER, num_hidden_layers=args.layers, vocab_size=args.vocabulary)
    for bits in (None, 4):
        print(json.dumps(compare(config, mx.bfloat16 if on_gpu() else mx.float32, bits, args)), flush=True)


if __name__ == "__main__":
    main()
