"""Memory modes: what each holds in memory, which one a run takes, and which files can be streamed.

fast      all networks, or in training all that the gradient needs
lean      one network at a time; in training only the input of each block
stream    as lean, but of the transformer and the text encoder only the blocks at work; the others stay in the file
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .checkpoints.folder import ModelFolder
from .checkpoints.registry import COMPONENTS
from .errors import ConfigError, listing
from .formats.quantize import bytes_by_dtype
from .memory import Mode, Stage, peak
from .model.parameters import EMBEDDING, block_of

STREAMED = ("text_encoder", "transformer")  # the networks whose blocks are read as they are needed
_CLEARLY = 0.9  # a mode is faster if it takes less than this share of the other's time
_NAMED = 2  # tensors that an error names


@dataclass(frozen=True)
class Choice:
    """The memory mode of a run, and the reason in words."""

    mode: Mode
    reason: str

    def sentence(self, folder: ModelFolder) -> str:
        """For people: the mode, the reason, and in the mode stream what is read."""
        reads = f"; a pass of the transformer reads {pass_bytes(folder) / 1e9:.3g} GB" if self.mode == "stream" else ""
        return f"{self.mode}: {self.reason}{reads}"


def choose(
    asked: str,
    estimates: Mapping[Mode, Sequence[Stage]],
    limit: int | None,
    measured: Callable[[Mode], float | None] = lambda mode: None,
) -> Choice:
    """The mode that is `asked` for. With "auto", the first of `estimates` that fits into `limit` bytes, else the last.

    estimates: the stages of a run by mode, the best mode first. limit: None if it is not known. measured: the seconds
    of the run in a mode on this machine. If lean is clearly faster than fast there, it comes first.
    """
    modes: dict[str, Mode] = {"fast": "fast", "lean": "lean", "stream": "stream"}
    if asked in modes:
        return Choice(modes[asked], "as asked")
    room = "" if limit is None else f"{limit / 1e9:.1f} GB are there"
    reasons: list[str] = []
    fast, lean = (measured(mode) if mode in estimates else None for mode in ("fast", "lean"))
    if fast and lean and lean < _CLEARLY * fast:
        estimates = {mode: stages for mode, stages in estimates.items() if mode != "fast"}
        reasons.append(f"fast takes {fast / lean:.1f} times as long by `zimage doctor`")
    for mode, stages in estimates.items():
        most = peak(stages).total
        if limit is None or most <= limit:
            return Choice(mode, ", ".join(filter(None, [*reasons, f"it takes about {_amount(most)}", room])))
        reasons.append(f"{mode} takes about {_amount(most)}")
    return Choice(mode, ", ".join([*reasons, room]))


def _amount(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def pass_bytes(folder: ModelFolder) -> int:
    """The bytes that one pass of the transformer reads: its blocks as the file stores them."""
    tensors = folder.weights["transformer"]
    return sum(bytes_by_dtype(tensor for name, tensor in tensors.items() if block_of(name)).values())


def can_stream(folder: ModelFolder) -> bool:
    """Whether all blocks are stored so that they can be read as they are needed."""
    return not any(_computed(folder, component) for component in STREAMED)


def require_streamable(folder: ModelFolder) -> None:
    """Raises ConfigError, with the command that helps, unless `can_stream`."""
    for component in STREAMED:
        if names := _computed(folder, component):
            file = folder.files.get(component, folder.path / component)
            kind = COMPONENTS[component].model_types[0]
            raise ConfigError(
                f"{file}: {listing(names, _NAMED)} must be computed from what is stored, and `memory` stream reads "
                f"weights as they are: make a file for it with zimage convert: `model_type` {kind}, `input` {file}, "
                f"`output` {file.stem}.npz"
            )


def _computed(folder: ModelFolder, component: str) -> list[str]:
    """The tensors that streaming needs and that are not stored as they are."""
    tensors = folder.weights[component].items()
    return [name for name, tensor in tensors if (block_of(name) or name == EMBEDDING) and not tensor.streamable]
