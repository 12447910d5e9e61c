"""Values that FastAPI gives to the functions of interfaces, and schemas of bodies that are dataclasses of options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Annotated, TypeAlias, get_args, get_origin, get_type_hints

from fastapi import Depends, Request

from zimage_ref.formats.json_file import JsonObject
from zimage_ref.generation.config import GenerateConfig
from zimage_ref.options import choices_of
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.kinds import FULL, kinds
from zimage_serve.work.runs import MASKS_HERE, NOT_ASKED
from zimage_serve.work.studio import Studio

_TYPES = {int: "integer", float: "number", bool: "boolean"}


def studio_of(request: Request) -> Studio:
    """The studio of the application that serves `request`."""
    studio: Studio = request.app.state.studio
    return studio


GivenStudio: TypeAlias = Annotated[Studio, Depends(studio_of)]

_ID = "the id of an upload or of a picture"
LORAS_FIELD: JsonObject = {
    "type": "array",
    "description": "LoRAs by name.",
    "items": {"type": "object", "properties": {"name": {"type": "string"}, "scale": {"type": "number"}}},
}
PICTURE_FIELDS: dict[str, JsonObject] = {
    "init_image": {"type": "string", "description": f"Picture to start from: {_ID}."},
    "mask": {"type": "string", "description": f"White parts are painted anew: {_ID}."},
    "control": {"type": "string", "description": "Name of a ControlNet of this server."},
    "control_image": {"type": "string", "description": f"Picture to follow, if there is a `control`: {_ID}."},
    "control_scale": {"type": "number", "description": "How strongly the ControlNet acts.", "default": 1.0},
    "count": {"type": "integer", "description": "Pictures to make. Their seeds are seed, seed + 1, ..."},
    "preview_steps": {"type": "integer", "description": "Steps from one preview to the next. 0 sends none."},
    "loras": LORAS_FIELD,
}
RUN_FIELDS: dict[str, JsonObject] = {
    "name": {"type": "string", "description": "Name of the LoRA to make."},
    "dataset": {"type": "string", "description": "Name of a dataset of this server."},
    "regularization": {
        "type": "string",
        "description": "Name of a dataset of ordinary pictures of the class; they get no trigger.",
    },
    "training_adapter": {"type": "string", "description": "Name of a LoRA of this server; for Turbo."},
    "mask": {
        "type": "string",
        "enum": list(MASKS_HERE),
        "default": MASKS_HERE[0],
        "description": "Part of a picture that is learned. file: the white of its mask.",
    },
    "init_lora": {"type": "string", "description": "Name of a LoRA of this server to go on from."},
    "kind": {
        "type": "string",
        "description": "Form of the change of a weight. Every program reads lora; lokr is small, others are slower.",
        "enum": [kind for kind in kinds() if kind != FULL],
        "default": TrainConfig.kind,
    },
}


def body(config: type[GenerateConfig] | type[TrainConfig], own: Mapping[str, JsonObject]) -> JsonObject:
    """The part of the OpenAPI page for a body with the fields of `config` and its `own`."""
    hints, properties = get_type_hints(config), dict(own)
    for each in fields(config):
        if each.name in own or (config is TrainConfig and each.name in NOT_ASKED):
            continue
        kind = next((t for t in (hints[each.name], *get_args(hints[each.name])) if t in _TYPES), str)
        schema: JsonObject = {"type": _TYPES.get(kind, "string"), "description": each.metadata["help"]}
        if get_origin(hints[each.name]) is tuple:
            schema = {"type": "array", "items": {"type": schema["type"]}, "description": schema["description"]}
            if each.metadata.get("repeatable"):
                schema["x-lines"] = True  # a value may have commas, so the page gives each a line of its own
        elif choices := choices_of(each):
            schema["enum"] = list(choices)
        if each.default not in (MISSING, None) and not isinstance(each.default, tuple):
            schema["default"] = each.default
        properties[each.name] = schema
    content = {"application/json": {"schema": {"type": "object", "properties": properties}}}
    return {"requestBody": {"required": True, "content": content}}


PICTURE_BODY = body(GenerateConfig, PICTURE_FIELDS)
RUN_BODY = body(TrainConfig, RUN_FIELDS)
