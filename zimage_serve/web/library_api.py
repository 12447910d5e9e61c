"""The server's own interface for checkpoints, and for files that are made of others."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from zimage_ref.formats.json_file import JsonObject
from zimage_serve.work.conversions import CHECKPOINT_FIELDS, LORA_FIELDS, choices_of_field

from .bodies import json_object
from .given import LORAS_FIELD, GivenStudio
from .streams import events, stream

router = APIRouter(prefix="/api")
_SAID = {
    "name": "Name of the file to make.",
    "checkpoint": "Name of the checkpoint to begin with. Without it, the transformer of this server.",
    "rank": "Reduce the LoRA to this rank.",
    "quantize": "Bits of the large matrices.",
    "group_size": "Weights that share one scale, if they are quantized.",
    "naming": "Names of the tensors to write.",
    "dtype": "Precision to write. Without it, as stored.",
}
_NUMBERS = ("rank", "quantize", "group_size")


def _body(kind: str, fields: set[str]) -> JsonObject:
    """The part of the OpenAPI page for a request with these fields."""
    properties: JsonObject = {"loras": LORAS_FIELD}
    for name in (name for name in _SAID if name in fields):
        schema: JsonObject = {"type": "integer" if name in _NUMBERS else "string", "description": _SAID[name]}
        if choices := choices_of_field(kind, name):
            schema["enum"] = list(choices)
        properties[name] = schema
    content = {"application/json": {"schema": {"type": "object", "properties": properties}}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/loras/convert", tags=["LoRAs"], status_code=202, openapi_extra=_body("lora", LORA_FIELDS))
async def convert_loras(request: Request, studio: GivenStudio) -> dict[str, object]:
    """Makes one LoRA of one or more: in another naming, precision or rank, or their sum. Answers a task."""
    task = await run_in_threadpool(studio.conversions.lora, await json_object(request))
    return task.facts()


@router.get("/checkpoints", tags=["checkpoints"])
def checkpoints(studio: GivenStudio) -> list[dict[str, object]]:
    """The transformer of this server, and all files in its folder of checkpoints, with facts from their headers."""
    return studio.checkpoints.all()


@router.post(
    "/checkpoints/convert", tags=["checkpoints"], status_code=202, openapi_extra=_body("checkpoint", CHECKPOINT_FIELDS)
)
async def convert_checkpoint(request: Request, studio: GivenStudio) -> dict[str, object]:
    """Makes a checkpoint: quantized, in another precision or naming, with LoRAs merged in. Answers a task."""
    task = await run_in_threadpool(studio.conversions.checkpoint, await json_object(request))
    return task.facts()


@router.get("/checkpoints/{name}", tags=["checkpoints"])
def inspect(name: str, studio: GivenStudio) -> dict[str, object]:
    """Facts about a checkpoint, and its tensors."""
    return studio.checkpoints.inspect(name)


@router.get("/checkpoints/{name}/file", tags=["checkpoints"])
def download(name: str, studio: GivenStudio) -> Response:
    """A checkpoint."""
    path = studio.checkpoints.file(name)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.patch("/checkpoints/{name}", tags=["checkpoints"])
async def rename(name: str, request: Request, studio: GivenStudio) -> dict[str, object]:
    """Renames a checkpoint: a JSON object with its new `name`."""
    asked = await json_object(request)
    return await run_in_threadpool(studio.checkpoints.rename, name, asked.get("name"))


@router.delete("/checkpoints/{name}", tags=["checkpoints"], status_code=204)
def delete(name: str, studio: GivenStudio) -> None:
    """Deletes a checkpoint."""
    studio.checkpoints.delete(name)


@router.get("/tasks", tags=["tasks"])
def tasks(studio: GivenStudio) -> list[dict[str, object]]:
    """Files in the making, and the last that were made, the newest first."""
    return [task.facts() for task in studio.tasks.all()]


@router.get("/tasks/{id}", tags=["tasks"])
def task(id: str, studio: GivenStudio) -> dict[str, object]:
    """How far a file in the making is. notes: what its user should know."""
    return studio.tasks.find(id).facts()


@router.delete("/tasks/{id}", tags=["tasks"])
def cancel(id: str, studio: GivenStudio) -> dict[str, object]:
    """Gives up a file in the making."""
    return studio.tasks.cancel(id).facts()


@router.get("/tasks/{id}/events", tags=["tasks"])
async def follow(id: str, request: Request, studio: GivenStudio) -> Response:
    """The events of a file in the making, server-sent: queued, started, progress, and its end."""
    return stream(events(studio.tasks.find(id).feed, request))
