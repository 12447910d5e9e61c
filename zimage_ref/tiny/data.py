"""The training data of the tiny model: drawings with captions, and captions as tokens of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context

import numpy as np

from zimage_ref.formats.tensors import Array
from zimage_ref.model.positions import SEQUENCE_MULTIPLE
from zimage_ref.model.tokenizer import Tokenizer

from .drawings import SHAPES, articles, describe, draw, made_up_word, scenes

STEPS, GUIDANCE = 8, 3.0  # the settings for using the model; it is trained to need only so few steps
TOKENS = SEQUENCE_MULTIPLE  # the length of every caption, padded
MADE_UP = 0.06  # the share of captions that name a shape by a word without a meaning
BARE = 0.06  # the share of captions that do not name the background
_PART = 1000  # drawings from one stream of random scenes, and in one call of a worker process


def drawings(count: int, seed: int) -> tuple[Array, list[str]]:
    """`count` pictures (N, SIDE, SIDE, 3) uint8 and their captions, drawn by up to 16 processes."""
    sizes = [min(_PART, count - start) for start in range(0, count, _PART)]
    work = [(seed, i, size) for i, size in enumerate(sizes)]
    if len(work) == 1:
        return _part(*work[0])
    with get_context("spawn").Pool(min(len(work), 16)) as pool:
        parts = pool.starmap(_part, work)
    return np.concatenate([pictures for pictures, _ in parts]), [c for _, captions in parts for c in captions]


def _part(seed: int, part: int, size: int) -> tuple[Array, list[str]]:
    rng = np.random.default_rng((seed, part))
    chosen = [scene for scene, _ in zip(scenes(rng), range(size), strict=False)]
    pictures = np.stack([np.asarray(draw(scene, rng)) for scene in chosen])
    captions = []
    for scene in chosen:
        words = scene.subject.split(" ")
        named = [i for i, word in enumerate(words) if word in SHAPES]
        if named and rng.uniform() < MADE_UP:
            words[named[rng.integers(len(named))]] = made_up_word(rng)
        subject = " ".join(words)
        bare = rng.uniform() < BARE
        captions.append(articles(subject) if bare else describe(replace(scene, subject=subject), rng))
    return pictures, captions


def tokenized(tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[Array, Array]:
    """Token ids (N + 1, TOKENS) int32 filled up with 0, and lengths (N + 1,). The first is that of ""."""
    encoded = [tokenizer.encode(text) for text in ("", *captions)]
    lengths = np.array([len(e) for e in encoded], np.int32)
    ids = np.zeros((len(encoded), TOKENS), np.int32)
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = tokens
    return ids, lengths
