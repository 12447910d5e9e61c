"""The usual options of each model, and presets: named sets of options that people use.

Sources: README of Tongyi-MAI/Z-Image and Tongyi-MAI/Z-Image-Turbo; model card of alibaba-pai/Z-Image-Fun-Lora-Distill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from zimage_ref.model.config import SchedulerConfig
from zimage_ref.model.flow import is_turbo


@dataclass(frozen=True)
class Defaults:
    """The values of options that the model decides."""

    steps: int
    guidance: float
    preview_steps: int  # during training: the picture is nearly the same, and sooner there


TURBO = Defaults(steps=8, guidance=0.0, preview_steps=8)
BASE = Defaults(steps=50, guidance=4.0, preview_steps=30)


def defaults_for(scheduler: SchedulerConfig) -> Defaults:
    """The defaults of the model with this scheduler."""
    return TURBO if is_turbo(scheduler) else BASE


def by_model(name: str) -> str:
    """The defaults of the option `name` for both models, in words."""
    return f"{getattr(TURBO, name):g} for Turbo, {getattr(BASE, name):g} for the base model"


@dataclass(frozen=True)
class Preset:
    """A set of options. Options that a user gives take precedence."""

    turbo: bool  # whether it is for Turbo; otherwise it is for the base model
    options: Mapping[str, object]  # fields of GenerateConfig
    loras: tuple[tuple[str, float], ...] = field(default=())  # name and strength; LoRAs of the user replace them


def _usual(defaults: Defaults, shift: float) -> dict[str, object]:
    return {"steps": defaults.steps, "guidance": defaults.guidance, "shift": shift, "sampler": "euler"}


_DISTILL = "alibaba-pai/Z-Image-Fun-Lora-Distill:Z-Image-Fun-Lora-Distill-8-Steps-2603.safetensors"
PRESETS = {
    "turbo": Preset(True, _usual(TURBO, shift=3.0)),
    "base": Preset(False, _usual(BASE, shift=6.0)),
    "base-distilled-8": Preset(False, {"steps": 8, "guidance": 0.0, "sampler": "euler"}, ((_DISTILL, 0.8),)),
}


def misfit(name: str, scheduler: SchedulerConfig) -> str:
    """A warning if the preset `name` is for the other model; "" if it fits."""
    wanted, here = ("Turbo" if turbo else "the base model" for turbo in (PRESETS[name].turbo, is_turbo(scheduler)))
    return "" if wanted == here else f"the preset {name} is for {wanted}, and this is {here}"
