"""What the machines of a group tell one another besides gradients: that they do the same work, from the same state."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import numpy as np

from zimage_mlx.device import number
from zimage_ref.errors import TrainingError
from zimage_ref.formats.tensors import Array, Tensors
from zimage_ref.training.facts import DECIDING, RunFacts, SavedFacts, deciding_options
from zimage_ref.training.run_folder import SavedState

# What mlx.launch and MPI's launchers set for the processes that they start
_LAUNCHERS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_BACKENDS = ("[ring]", "[mpi]", "[nccl]", "[jaccl]")  # that MLX's errors begin with


def is_first() -> bool:
    """Whether this is the machine that writes and reports; one that trains alone is."""
    return bool(group().rank() == 0)


def group() -> mx.distributed.Group:
    """The machines that were started together; this one alone, unless a launcher started it.

    Without a launcher MLX would look for one in every library that it knows, and MPI's takes seconds to say no.
    """
    launched = any(name in os.environ for name in _LAUNCHERS)
    return mx.distributed.init() if launched else mx.distributed.init(backend="ring")


def summed(array: mx.array, group: mx.distributed.Group) -> mx.array:
    """The sum over all machines, computed: the GPU must not wait for the network.

    Metal ends work that waits for some seconds, and another machine may need more until it takes part.
    """
    total: mx.array = mx.distributed.all_sum(array, group=group)
    mx.eval(total)
    return total


def summed_together(arrays: Sequence[mx.array], group: mx.distributed.Group) -> list[mx.array]:
    """`summed` of each, float32, in one message: each message costs the time of a way there and back."""
    shapes = [array.shape for array in arrays]
    ends = np.cumsum([array.size for array in arrays]).tolist()
    total = summed(mx.concatenate([array.reshape(-1) for array in arrays]), group)
    parts = mx.split(total, ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def greatest(array: mx.array, group: mx.distributed.Group) -> mx.array:
    """The greatest of all machines, element by element; computed, as `summed` is."""
    most: mx.array = mx.distributed.all_max(array, group=group)
    mx.eval(most)
    return most


@contextmanager
def lost_machine_is_an_error() -> Iterator[None]:
    """A block in which an error of MLX that means that another machine is gone becomes a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_BACKENDS):
            raise
        raise TrainingError(f"another machine of the group is gone: go on with `resume`: {error}") from error


class Machines:
    """The machines that train together, as one of them sees the group. Each must call the same methods in turn."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        """should_stop: whether this machine was asked to stop."""
        self.group = group()
        self.rank, self.size = self.group.rank(), self.group.size()
        self.first, self.alone = self.rank == 0, self.size == 1
        self._should_stop = should_stop

    def asked_to_stop(self) -> bool:
        """Whether any machine was asked to; all learn it at the same step."""
        asked = self._should_stop()
        if self.alone:
            return asked
        return bool(number(summed(mx.array(float(asked)), self.group)))

    def agree(self, facts: RunFacts) -> None:
        """Raises TrainingError unless all machines have the same pictures, weights and options.

        Options that change no result may differ.
        """
        if self.alone:
            return
        config = deciding_options(facts["config"])
        by_name = cast(Mapping[str, object], facts)
        text = json.dumps([config, facts["total"], *(by_name[key] for key in DECIDING)], sort_keys=True)
        own = mx.array(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).astype(np.float32))
        if np.any(np.array(greatest(own, self.group)) != -np.array(greatest(-own, self.group))):
            raise TrainingError("the machines differ in pictures, model or options: give all of them the same")

    def told_by_first(
        self, saved: SavedState | None, facts: RunFacts, fresh: Mapping[str, Tensors]
    ) -> SavedState | None:
        """The state that the first machine resumes from, `saved` there, on every machine; None if it has none.

        facts: of this run. fresh: the tensors of a new state, for their names and shapes.
        """
        if self.alone:
            return saved
        smoothed, failures = (saved.facts["smoothed"], saved.facts["failures"]) if saved else (None, 0)
        numbers = [saved.step if saved else 0, failures, smoothed or 0.0]
        step, told_failures, told_smoothed = self._told(np.array(numbers, np.float32) * self.first).tolist()
        if not step:
            return None
        tensors = {
            part: {
                name: self._told(
                    saved.tensors[part][name] if self.first and saved else np.zeros(each.shape, each.dtype)
                )
                for name, each in sorted(tensors.items())
            }
            for part, tensors in sorted(fresh.items())
        }
        if not self.first:
            smoothed, failures = told_smoothed, int(told_failures)
        kept, unpacks = (saved.facts.get("kept_bytes"), saved.facts.get("unpacks")) if saved else (None, None)
        own: SavedFacts = {
            **facts, "smoothed": smoothed, "failures": failures, "kept_bytes": kept, "unpacks": unpacks
        }  # fmt: skip
        return SavedState(int(step), own, tensors)

    def _told(self, array: Array) -> Array:
        """The sum over machines. All except the first give zeros."""
        return np.array(summed(mx.array(array.astype(np.float32)), self.group)).astype(array.dtype)
