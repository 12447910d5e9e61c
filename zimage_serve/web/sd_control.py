"""ControlNet as the clients of AUTOMATIC1111's extension ask for it: a unit in alwayson_scripts, and lists of names.

Sources: scripts/api.py and external_code.py of sd-webui-controlnet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastapi import APIRouter

from zimage_ref.formats.json_file import JsonObject
from zimage_ref.pictures.maps import KINDS
from zimage_serve.refusals import RefusedError
from zimage_serve.work.studio import Studio

from .given import GivenStudio
from .given_pictures import kept

router = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"])
SCRIPT = "controlnet"  # its name in alwayson_scripts
_RENAMED = {"weight": "control_scale", "guidance_start": "control_start", "guidance_end": "control_end"}
_MODULES = {"grayscale": "gray"}  # names of that extension -> ours; others are equal
_HASH = re.compile(r"\s*\[\w+\]$")  # behind the name of a model there
_VERSION = 2  # of the interface of the extension


def scripts_of(asked: Mapping[str, object]) -> dict[str, object]:
    """The scripts of a request, by their names in lower case. Raises RefusedError if they are no object."""
    scripts = asked.get("alwayson_scripts") or {}
    if not isinstance(scripts, Mapping):
        raise RefusedError("`alwayson_scripts` must be an object")
    return {str(name).lower(): value for name, value in scripts.items()}


def unit_of(asked: Mapping[str, object]) -> JsonObject | None:
    """The one enabled unit of a request. None if there is none. Raises RefusedError for several."""
    script = scripts_of(asked).get(SCRIPT)
    units = script.get("args") if isinstance(script, Mapping) else None
    if not isinstance(units, list):
        return None
    found = [dict(unit) for unit in units if isinstance(unit, Mapping) and unit.get("enabled", True)]
    if len(found) > 1:
        raise RefusedError("`alwayson_scripts`: a picture follows one ControlNet here: enable one unit")
    return found[0] if found else None


def fields_of(unit: JsonObject, studio: Studio) -> dict[str, object]:
    """The fields of the own interface for `unit`. Raises RefusedError, and the errors of `kept`."""
    picture = unit.get("image") or unit.get("input_image")
    if isinstance(picture, Mapping):  # the form of old versions, with a mask beside the picture
        picture = picture.get("image")
    kind = str(unit.get("module") or KINDS[0]).lower()
    names = {"control": _HASH.sub("", str(unit.get("model") or "")), "control_kind": _MODULES.get(kind, kind)}
    found: dict[str, object] = {ours: unit[theirs] for theirs, ours in _RENAMED.items() if theirs in unit}
    if picture is not None:
        found["control_image"] = kept(picture, "image", studio)
    return names | found


@router.get("/version")
def version() -> dict[str, int]:
    """The version of the interface of the extension."""
    return {"version": _VERSION}


@router.get("/model_list")
def model_list(studio: GivenStudio) -> dict[str, list[str]]:
    """The ControlNets of this server."""
    return {"model_list": studio.controls.names()}


@router.get("/module_list")
def module_list() -> dict[str, list[str]]:
    """The maps that are made here from a picture."""
    return {"module_list": list(KINDS)}
