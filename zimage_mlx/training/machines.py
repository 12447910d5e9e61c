"""What the machines of a group tell one another besides gradients: that they do the same work, from the same state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from zimage_ref.errors import TrainingError
from zimage_ref.formats.tensors import Array
from zimage_ref.training.run_folder import Saved

_KEYS = ("config", "total", "batch", "dataset", "model", "adapter")  # of a run's facts
_BACKENDS = ("[ring]", "[mpi]", "[nccl]", "[jaccl]")  # that MLX's errors begin with
Tensors = Mapping[str, Mapping[str, Array]]


def is_first() -> bool:
    """Whether this is the machine that writes and reports; alone, it is."""
    return bool(mx.distributed.init().rank() == 0)


@contextmanager
def losses() -> Iterator[None]:
    """A block in which the loss of another machine is a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_BACKENDS):
            raise
        raise TrainingError(f"another machine of the group is gone: go on with `resume`: {error}") from error


def agree(group: mx.distributed.Group, facts: Mapping[str, Any], free: set[str]) -> None:
    """Raises TrainingError unless all machines have the same pictures, weights and options, less the `free` ones."""
    config = {name: value for name, value in facts["config"].items() if name not in free}
    text = json.dumps([config, *(facts[key] for key in _KEYS if key != "config")], sort_keys=True)
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).astype(np.float32)
    spread = mx.distributed.all_max(mx.array(own), group=group) + mx.distributed.all_max(mx.array(-own), group=group)
    if mx.any(spread != 0).item():
        raise TrainingError("the machines differ in pictures, model or options: give all of them the same")


def told_by_first(group: mx.distributed.Group, saved: Saved | None, fresh: Tensors) -> Saved | None:
    """What the first machine resumes from, on every machine; `fresh` has the names and shapes of its tensors."""
    first = group.rank() == 0
    facts = saved.facts if saved else {"smoothed": None, "failures": 0}
    numbers = [saved.step if saved else 0, facts["failures"], facts["smoothed"] or 0.0]
    step, failures, smoothed = _told(group, np.array(numbers, np.float32) * first).tolist()
    if not step:
        return None
    tensors = {
        part: {
            name: _told(group, saved.tensors[part][name] if first and saved else np.zeros_like(array))
            for name, array in sorted(arrays.items())
        }
        for part, arrays in sorted(fresh.items())
    }
    kept = facts if first else {"smoothed": smoothed, "failures": int(failures)}
    return Saved(int(step), dict(kept), tensors)


def _told(group: mx.distributed.Group, array: Array) -> Array:
    """The sum over machines, of which only the first has anything but zeros."""
    whole = mx.distributed.all_sum(mx.array(array.astype(np.float32)), group=group)
    return np.array(whole).astype(array.dtype)
