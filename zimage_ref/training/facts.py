"""The facts of a run. If they are the same, a resumed run gives the same bytes. They are saved with its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, cast

from zimage_ref.errors import FormatError
from zimage_ref.options_file import plain

from .config import auto_options, default_options, free_options, is_former_auto


class RunFacts(TypedDict):
    """The facts of a run, as JSON. Digests are SHA-256 in hexadecimal."""

    config: dict[str, object]  # every option; for `lr` the rate in use
    total: int  # number of steps
    batch: int  # pictures in a batch, of all machines together
    dataset: str  # the digest of pictures and captions
    model: dict[str, str]  # part of the model -> its digest
    adapter: str | None  # the digest of the file of the training adapter
    begins_with: str | None  # the digest of the LoRA that the run goes on from
    environment: dict[str, str]  # software and machine


class _CountedFacts(RunFacts):
    """The facts of a run, and the counters of its loop at the saved step."""

    smoothed: float | None  # the average of the loss
    failures: int  # consecutive steps without a finite loss


class SavedFacts(_CountedFacts, total=False):
    """The same, and what runs of version 0.1 did not save."""

    kept_bytes: float | None  # that the gradient may keep of the forward pass; None if the machine does not limit it
    unpacks: bool | None  # whether quantized weights are unpacked for products; None if it was not saved


_KINDS: dict[str, type | tuple[type, ...]] = {
    "config": dict, "total": int, "batch": int, "dataset": str, "model": dict, "adapter": (str, type(None)),
    "begins_with": (str, type(None)),
    "environment": dict, "smoothed": (float, int, type(None)), "failures": int,
    "kept_bytes": (float, int, type(None)), "unpacks": (bool, type(None)),
}  # fmt: skip
_NEWER = {"kept_bytes", "unpacks", "begins_with"}  # facts that an older version did not save
DECIDING = {  # a fact that decides the result, besides options and the number of steps -> its name for people
    "dataset": "the pictures, captions or masks",
    "model": "the model's weights or tokenizer",
    "adapter": "the training adapter",
    "begins_with": "the LoRA that the run goes on from",
    "batch": "the number of machines",
}


def checked_facts(data: object) -> SavedFacts:
    """`data`, read from JSON, as facts. Raises FormatError if a fact is missing or has another type."""
    if not isinstance(data, dict):
        raise FormatError("its state.json has no facts of its run")
    for name, kind in _KINDS.items():
        if (name not in data and name not in _NEWER) or not isinstance(data.get(name), kind):
            raise FormatError(f"of the facts of its run, {name} is missing or of another type")
    return cast(SavedFacts, data)


def changes(then: RunFacts, now: RunFacts) -> list[str]:
    """The changed facts that change the result, in words."""
    found, before_all = [], deciding_options({**_defaults(), **then["config"]})
    for name, value in deciding_options(now["config"]).items():
        before = before_all.get(name)
        if is_former_auto(name, before):
            before = None
        if before != value:
            found.append(f"`{name}` {_in_words(name, before)} -> {_in_words(name, value)}")
    old, new = cast(Mapping[str, object], then), cast(Mapping[str, object], now)
    return found + [text for key, text in DECIDING.items() if old.get(key) != new.get(key)]


def deciding_options(options: Mapping[str, object]) -> dict[str, object]:
    """Those of `options`, as JSON, that decide the result."""
    free = free_options()
    return {name: _without_folders(value) for name, value in options.items() if name not in free}


def _defaults() -> dict[str, object]:
    """The defaults of options, as JSON: an older version did not save those that it had not."""
    return {name: plain(value) for name, value in default_options().items()}


def _without_folders(value: object) -> object:
    """`value` without the folders of datasets. They may move: digests tell whether pictures and captions changed."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in item.items() if k != "folder"} if isinstance(item, dict) else item for item in value]


def _in_words(name: str, value: object) -> object:
    if value is None and name in auto_options():
        return "auto"
    return "none" if value in (None, "", []) else value
