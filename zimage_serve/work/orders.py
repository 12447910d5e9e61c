"""What a client asks for, checked: the pictures of a job. All interfaces make one of these."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_type_hints

from zimage_ref.bounds import CONTROL_SCALE, LORA_SCALE
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.checkpoints.hub import BUILT_IN, TINY
from zimage_ref.errors import ConfigError
from zimage_ref.formats.json_file import JsonObject
from zimage_ref.generation.config import GenerateConfig, config_of
from zimage_ref.generation.jobs import plan_requests
from zimage_ref.generation.sizes import random_seed
from zimage_ref.model.flow import is_turbo
from zimage_ref.options_file import typed
from zimage_serve.refusals import RefusedError
from zimage_serve.settings import ServeSettings

PICTURES = ("init_image", "mask", "control_image")  # fields whose value is the id of a picture
_HINTS = get_type_hints(GenerateConfig)
_CONTROL, _CONTROL_SCALE = "control", "control_scale"
_NAMED = (*PICTURES, _CONTROL)  # fields of GenerateConfig that are paths there, and names or ids here
FIELDS = (*_HINTS, _CONTROL_SCALE, "count", "loras", "preview_steps")  # that a request for pictures may have
_MOST_LORAS = 16
LONGEST_PROMPT = 20_000  # characters


@dataclass(frozen=True)
class PictureOrder:
    """The pictures of one job. They differ only in their seed."""

    configs: tuple[GenerateConfig, ...]
    loras: tuple[tuple[Path, float], ...] = ()
    preview_steps: int = 0  # steps from one preview to the next; 0: no previews

    @property
    def settings(self) -> object:
        """A value that is equal for orders whose pictures can be made together."""
        return replace(self.configs[0], prompt="", negative_prompt="", seed=0), self.loras, self.preview_steps


@dataclass(frozen=True)
class OrderDesk:
    """Turns the fields of a request into an order, or refuses it."""

    model: ModelFolder
    settings: ServeSettings
    defaults: Mapping[str, object]  # fields of GenerateConfig to use if a client leaves them out
    find_picture: Callable[[object, str], Path]  # id and field -> file
    find_lora: Callable[[object], Path]  # name -> file
    find_control: Callable[[object], Path]  # name -> file or folder

    def order(self, asked: Mapping[str, object]) -> PictureOrder:
        """The order for the fields in `asked`, some of FIELDS. None means the default.

        Raises RefusedError or UnknownError, ConfigError for options that do not fit, DatasetError for bad pictures.
        """
        given = {name: value for name, value in asked.items() if value is not None}
        for name in given:
            if name not in FIELDS:
                close = difflib.get_close_matches(name, FIELDS, 1)
                raise RefusedError(f"`{name}` is not known" + (f": is `{close[0]}` meant?" if close else ""))
        options = {
            name: typed(value, _HINTS[name], f"`{name}`")
            for name, value in given.items() if name in _HINTS and name not in _NAMED
        }  # fmt: skip
        options |= {name: self.find_picture(given[name], name) for name in PICTURES if name in given}
        options |= self._control(given)
        config = self._config(options)
        if config.steps is not None and config.steps > self.settings.max_steps:  # before a schedule is made of them
            raise RefusedError(f"`steps` {config.steps} is more than the {self.settings.max_steps} allowed here")
        count = _whole("count", given.get("count", 1), 1, self.settings.max_count)
        order = PictureOrder(
            tuple(replace(config, seed=config.seed + i) for i in range(count)),
            scaled_loras(given.get("loras", []), self.find_lora),
            _whole("preview_steps", given.get("preview_steps", 0), 0, self.settings.max_steps),
        )
        self._check(order)
        return order

    def _config(self, options: dict[str, object]) -> GenerateConfig:
        if "prompt" not in options:
            raise RefusedError("`prompt` is missing")
        for name in ("prompt", "negative_prompt"):
            if len(str(options.get(name, ""))) > LONGEST_PROMPT:
                raise RefusedError(f"`{name}` has more than {LONGEST_PROMPT:,} characters")
        if options.get("seed", -1) == -1:  # as other programs ask for any seed
            options["seed"] = random_seed()
        defaults = dict(self.defaults)
        if {"init_image", "control_image", "width", "height"} & options.keys():
            defaults = {name: value for name, value in defaults.items() if name not in ("width", "height")}
        return config_of({**defaults, **options})

    def _control(self, given: Mapping[str, object]) -> dict[str, object]:
        """The ControlNet of a request as the field `control` of GenerateConfig."""
        if _CONTROL not in given:
            if _CONTROL_SCALE in given:
                raise RefusedError(f"`{_CONTROL_SCALE}` needs `{_CONTROL}`")
            return {}
        scale = typed(given.get(_CONTROL_SCALE, 1.0), float, f"`{_CONTROL_SCALE}`")
        CONTROL_SCALE.check(_CONTROL_SCALE, scale)
        return {_CONTROL: f"{self.find_control(given[_CONTROL])}:{scale!r}"}

    def _check(self, order: PictureOrder) -> None:
        """Refuses what the model cannot draw or the limits do not allow. No weights are read."""
        (request,) = plan_requests(order.configs[:1], self.model)
        request.config.check_guidance()
        limits = self.settings
        made = request.result
        if made.width * made.height > limits.max_pixels:
            raise RefusedError(
                f"{made.width} x {made.height} is more than the {limits.max_pixels:,} pixels allowed here"
            )


def scaled_loras(asked: object, find: Callable[[object], Path]) -> tuple[tuple[Path, float], ...]:
    """The files and scales of [{"name": ..., "scale": ...}], or of names alone. find: name -> file."""
    if not isinstance(asked, Sequence) or isinstance(asked, str) or len(asked) > _MOST_LORAS:
        raise RefusedError(f"`loras` is a list of at most {_MOST_LORAS} objects with `name` and `scale`")
    found = []
    for item in asked:
        entry: JsonObject = dict(item) if isinstance(item, Mapping) else {"name": item}
        if unknown := entry.keys() - {"name", "scale"}:
            raise RefusedError(f"`loras`: {min(map(str, unknown))} is not known: give `name` and `scale`")
        scale = typed(entry.get("scale", 1.0), float, "`scale` of a LoRA")
        LORA_SCALE.check("scale", scale)
        found.append((find(entry.get("name")), scale))
    return tuple(found)


def facts_of(model: ModelFolder) -> dict[str, object]:
    """What clients may know of the model."""
    return {
        "name": TINY if model.path == BUILT_IN else model.path.name,
        "kind": "turbo" if is_turbo(model.scheduler) else "base",
        "size_multiple": model.size_multiple,
        "longest_side": model.size_multiple * min(model.transformer.axes_lens[1:]),
    }


def _whole(name: str, value: object, low: int, high: int) -> int:
    number: int = typed(value, int, f"`{name}`")
    if not low <= number <= high:
        raise ConfigError(f"`{name}` {number} must be between {low} and {high}")
    return number
