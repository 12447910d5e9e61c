"""LoRAs made into one LoRA, or into the checkpoint; and how large an update is. In NumPy, float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from zimage_ref.errors import ConfigError, WeightError
from zimage_ref.formats.tensors import Array, Tensor, Tensors, cast

from .arithmetic import delta, updated
from .updates import Dense, DoRA, Hadamard, Kronecker, LoRA, LowRank, Plain, Update, by_parameter

_OVERSAMPLING, _POWER_ITERATIONS = 16, 4  # of the randomized SVD, arXiv 0909.4061


def merged(tensors: Tensors, loras: Sequence[tuple[LoRA, float]]) -> dict[str, Tensor]:
    """The checkpoint `tensors`, official names, with LoRAs baked in: each changed when it is read, in its own dtype."""
    return {**tensors, **{name: _merged(tensors[name], updates) for name, updates in by_parameter(loras).items()}}


def _merged(tensor: Tensor, updates: Sequence[tuple[Update, float]]) -> Tensor:
    def read() -> Array:
        return cast(updated(tensor.cast("f32").read(), updates), tensor.dtype)

    return Tensor(tensor.shape, tensor.dtype, read)


def combined(loras: Sequence[tuple[LoRA, float]], rank: int | None = None) -> LoRA:
    """One LoRA that does what all of `loras` at their scales do together.

    Low-rank updates are concatenated, exactly; with `rank`, each is then the best one of at most that rank (truncated
    SVD). What is not low-rank becomes dense where it is added to something else. Raises WeightError for DoRA, which
    depends on the base, in company or at a scale other than 1.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"`rank` {rank} must be at least 1")
    result: LoRA = {}
    for parameter, updates in by_parameter(loras).items():
        name = parameter.removesuffix(".weight")
        update = _sum(name, updates)
        result[name] = update if rank is None else reduced(name, update, rank)
    return result


def _sum(name: str, updates: Sequence[tuple[Update, float]]) -> Update:
    (first, scale), *others = updates
    if not others and scale == 1:
        return first
    plain = [(update, scale) for update, scale in updates if not isinstance(update, DoRA)]
    if len(plain) < len(updates):
        raise _needs_base(name)
    if not others:
        return replace(plain[0][0], scale=plain[0][0].scale * scale)
    low_rank = [(update, scale) for update, scale in plain if isinstance(update, LowRank)]
    if len(low_rank) == len(plain):
        A = np.concatenate([update.A for update, _ in low_rank])
        return LowRank(A, np.concatenate([u.B * np.float32(u.scale * scale) for u, scale in low_rank], axis=1))
    return Dense(np.sum([np.float32(scale) * _dense(update) for update, scale in plain], axis=0))


def _dense(update: Plain) -> Array:
    return delta(update, np.zeros(update.shape, np.float32))


def _needs_base(name: str) -> WeightError:
    return WeightError(
        f"{name}: a DoRA update depends on the base weight: it cannot be scaled, added or reduced without the base; "
        "bake it into a checkpoint of the transformer with `merge_lora`"
    )


def reduced(name: str, update: Update, rank: int) -> Update:
    """The nearest low-rank update of at most `rank`; norms' and biases' differences are left as they are."""
    if isinstance(update, DoRA):
        raise _needs_base(name)
    if len(update.shape) != 2 or (isinstance(update, LowRank) and update.rank <= rank):
        return update
    U, S, Vt = _svd(update, min(rank, *update.shape))
    root = np.sqrt(S[:rank])  # half to each side: both fit in float16
    return LowRank(root[:, None] * Vt[:rank], U[:, :rank] * root)


def _svd(update: Plain, rank: int) -> tuple[Array, Array, Array]:
    """U (out, k), S (k,), Vt (k, in) with k >= rank leading triples: exact for low-rank updates, else randomized."""
    if isinstance(update, LowRank):
        left, R = np.linalg.qr(update.B * np.float32(update.scale))
        right, L = np.linalg.qr(update.A.T)
        U, S, Vt = np.linalg.svd(R @ L.T)
        return left @ U, S, Vt @ right.T
    matrix = _dense(update)
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    basis = np.random.default_rng(0).standard_normal((matrix.shape[1], width)).astype(np.float32)
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ basis)[0])[0]
    U, S, Vt = np.linalg.svd(matrix @ basis, full_matrices=False)
    return U, S, Vt @ basis.T


def norm(update: Update) -> float:
    """The Frobenius norm of what the update adds; of a DoRA update, of what is inside."""
    if isinstance(update, DoRA):
        return norm(update.update)
    if isinstance(update, LowRank):  # ||B A||^2 = tr(B^T B A A^T): rank x rank, not out x in
        square = float(np.sum((update.B.T @ update.B) * (update.A @ update.A.T), dtype=np.float64))
        return abs(update.scale) * max(square, 0.0) ** 0.5
    if isinstance(update, Hadamard | Kronecker):
        return float(np.linalg.norm(_dense(update)))
    return abs(update.scale) * float(np.linalg.norm(update.D))


def module_groups(lora: LoRA) -> Mapping[str, list[Update]]:
    """The updates of the same module in different blocks together: layers.*.attention.to_q -> its updates."""
    groups: dict[str, list[Update]] = {}
    for name, update in lora.items():
        parts = name.split(".")
        groups.setdefault(".".join([parts[0], "*", *parts[2:]] if parts[1].isdigit() else parts), []).append(update)
    return groups
