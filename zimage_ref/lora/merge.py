"""Merges LoRAs into one LoRA or into a checkpoint. In NumPy, float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from zimage_ref.bounds import LORA_RANK
from zimage_ref.errors import WeightError
from zimage_ref.formats.tensors import DTYPES, Array, Tensor, Tensors, cast, float_dtype

from .arithmetic import NumPyArithmetic
from .kinds import Dense
from .low_rank import LowRank, concatenated
from .updates import LoRA, Update, by_parameter, updated


def merge_loras(tensors: Tensors, loras: Sequence[tuple[LoRA, float]], dtype: str | None = None) -> dict[str, Tensor]:
    """The checkpoint `tensors` (official names) with the LoRAs merged in.

    A tensor is changed when you read it. It is added up in float32 and rounded once: to `dtype`, or to the dtype that
    it had. So a weak LoRA stays in a float32 file though the base is bfloat16.
    """
    return {
        **tensors, **{name: _merged(tensors[name], updates, dtype) for name, updates in by_parameter(loras).items()}
    }  # fmt: skip


def _merged(tensor: Tensor, updates: Sequence[tuple[Update, float]], dtype: str | None) -> Tensor:
    target = float_dtype(dtype) if dtype else tensor.dtype

    def read() -> Array:
        weight = tensor.cast("f32").read()
        return cast(updated(weight, updates, NumPyArithmetic(DTYPES["f32"])), target)

    return Tensor(tensor.shape, target, read)


def combine_loras(loras: Sequence[tuple[LoRA, float]], rank: int | None = None) -> LoRA:
    """The sum of `loras` at their scales, as one LoRA.

    Low-rank updates are concatenated; the result is exact. With `rank`, each is then reduced to the best update of at
    most that rank (truncated SVD). Updates of other kinds become dense if they are added to others.
    Raises WeightError for DoRA with others or at a scale other than 1, because DoRA depends on the base weight.
    """
    if rank is not None:
        LORA_RANK.check("rank", rank)
    result: LoRA = {}
    for parameter, updates in by_parameter(loras).items():
        name = parameter.removesuffix(".weight")
        update = _sum(name, updates)
        result[name] = update if rank is None else reduced(name, update, rank)
    return result


def _sum(name: str, updates: Sequence[tuple[Update, float]]) -> Update:
    (first, first_scale), *others = updates
    if not others and first_scale == 1:
        return first
    plain = [(found, scale) for update, scale in updates if (found := update.plain) is not None]
    if len(plain) < len(updates):
        raise _needs_base(name, next(update for update, _ in updates if update.plain is None))
    if not others:
        return plain[0][0].scaled(first_scale)
    return concatenated(plain) or Dense(np.sum([np.float32(scale) * update.dense() for update, scale in plain], axis=0))


def _needs_base(name: str, update: Update) -> WeightError:
    return WeightError(
        f"{name}: a {update.title} update depends on the base weight: it cannot be scaled, added or reduced without "
        "the base; merge it into a checkpoint of the transformer with `merge_lora`"
    )


def reduced(name: str, update: Update, rank: int) -> Update:
    """The nearest low-rank update of at most `rank`. Updates of norms and biases do not change."""
    plain, low_rank = update.plain, update.low_rank
    if plain is None:
        raise _needs_base(name, update)
    if len(plain.shape) != 2 or (low_rank is not None and len(low_rank[0]) <= rank):
        return update
    U, S, Vt = plain.svd(min(rank, *plain.shape))
    root = np.sqrt(S[:rank])  # both factors get the root, so that both fit in float16
    return LowRank(root[:, None] * Vt[:rank], U[:, :rank] * root)


def module_groups(lora: LoRA) -> Mapping[str, list[Update]]:
    """The updates grouped by module over all blocks, such as layers.*.attention.to_q -> its updates."""
    groups: dict[str, list[Update]] = {}
    for name, update in lora.items():
        parts = name.split(".")
        groups.setdefault(".".join([parts[0], "*", *parts[2:]] if parts[1].isdigit() else parts), []).append(update)
    return groups
