"""The figures of the last run of the doctor, kept in the user's cache folder for estimates of time."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from zimage_ref.errors import FormatError
from zimage_ref.formats.json_file import JsonObject, read_json, write_json
from zimage_ref.formats.quantize import Quantization
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, TransformerConfig
from zimage_ref.version import __version__

from . import machine
from .findings import FORMAT, Findings
from .prediction import NAMES


def cache_file() -> Path:
    """The file with the figures: below XDG_CACHE_HOME, else ~/Library/Caches on a Mac, ~/.cache elsewhere."""
    given = os.environ.get("XDG_CACHE_HOME")
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(given) if given else home) / "zimage" / "doctor.json"


def identity() -> JsonObject:
    """The machine and the software that figures hold for."""
    facts = machine.hardware().facts
    try:
        mlx = version("mlx")
    except PackageNotFoundError:
        mlx = ""
    return {"format": FORMAT, "zimage": __version__, "mlx": mlx} | {
        name: facts.get(name) for name in ("system", "release", "architecture", "chip", "cores", "memory")
    }


def remember(findings: Findings) -> None:
    """Keeps the predictions of a healthy machine. Raises OSError if the cache folder cannot be written."""
    if findings.healthy and findings.predicted:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"of": identity(), "predicted": findings.predicted})


@dataclass(frozen=True)
class Figures:
    """Predictions for the published model on this machine."""

    predicted: JsonObject

    @classmethod
    def for_model(cls, model: TransformerConfig) -> Figures | None:
        """Those of this machine, if `model` has the sizes of the published one; else None."""
        return cls.of_this_machine() if model == OFFICIAL_TRANSFORMER else None

    @classmethod
    def of_this_machine(cls) -> Figures | None:
        """Those of the last run of the doctor. None if it has not run, or on another machine or other versions."""
        try:
            kept = read_json(cache_file())
        except FormatError:
            return None
        predicted = kept.get("predicted")
        return cls(predicted) if kept.get("of") == identity() and isinstance(predicted, dict) else None

    def picture(self, precision: str, pixels: int, predictions: int, mode: str) -> float | None:
        """Seconds of one picture, without reading weights. predictions: steps, twice as many with guidance."""
        forward = self._at("forward_seconds", precision, pixels)
        decode = self._at("decode_seconds", precision, pixels, mode)
        text: float | None = self.predicted.get("text_seconds", {}).get(precision)
        return None if forward is None or decode is None or text is None else text + predictions * forward + decode

    def step(self, precision: str, pixels: int, mode: str) -> float | None:
        """Seconds of a training step on one picture."""
        return self._at("step_seconds", precision, pixels, mode)

    def packed_is_faster(self, bits: int) -> bool:
        """Whether a product of many rows by weights of `bits` bits is faster with them packed. False if not known."""
        known: dict[str, float] = self.predicted.get("packed_speed", {})
        nearest = min(known, key=lambda measured: abs(int(measured) - bits), default=None)
        return nearest is not None and known[nearest] > 1

    def _at(self, work: str, precision: str, pixels: int, mode: str | None = None) -> float | None:
        """Between the sizes that are known; beyond them in proportion to the pixels."""
        found = self.predicted.get(work, {}).get(precision)
        found = found.get(mode) if found and mode else found
        if not found:
            return None
        known = sorted((int(side) ** 2, seconds) for side, seconds in found.items())
        sizes, seconds = zip(*known, strict=True)
        inside: int = min(max(pixels, sizes[0]), sizes[-1])
        return float(np.exp(np.interp(np.log(inside), np.log(sizes), np.log(seconds)))) * pixels / inside


def precision_name(dtype: str, quantization: Quantization | None) -> str:
    """The name of a precision in the figures: 8 or 4 for quantized weights, else that of the dtype."""
    if quantization:
        return str(quantization.bits)
    return next((short for short, name in NAMES.items() if name == dtype), dtype)
