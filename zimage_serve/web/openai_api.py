"""OpenAI's Images API and its list of models. Fields of the own interface work in it, too.

Sources: the official Python client (openai/types/image*.py), and Open WebUI's routers/images.py.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response

from zimage_ref.formats.json_file import JsonObject
from zimage_ref.pictures.received import reencoded
from zimage_serve.refusals import RefusedError
from zimage_serve.work.jobs import Job, State
from zimage_serve.work.orders import FIELDS
from zimage_serve.work.studio import Studio

from .bodies import json_object, picture_format, to_base64
from .errors import refusal
from .given import PICTURE_BODY, GivenStudio
from .given_pictures import with_ids
from .streams import client_of, event_text, finished, of_client, stream

router = APIRouter(prefix="/v1", tags=["OpenAI"])
_OURS = {*FIELDS} - {"count"}
_TAKEN = {
    "prompt", "model", "n", "size", "response_format", "output_format", "stream", "partial_images", "image", "mask",
}  # fmt: skip
# Fields of OpenAI's own models. They change nothing here, and the answer says so
_IDLE = {
    "background", "complexity", "frame_count", "frame_duration_ms", "input_fidelity", "moderation",
    "output_compression", "quality", "safety_identifier", "style", "user",
}  # fmt: skip
_MOST_PARTIAL = 3
_TOKENS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
           "input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}  # fmt: skip


@router.get("/models")
def models(studio: GivenStudio) -> dict[str, object]:
    """The one model of this server."""
    return {"object": "list", "data": [_model(studio)]}


@router.get("/models/{name}")
def model(name: str, studio: GivenStudio) -> dict[str, object]:
    """The model of this server, whatever name is asked for."""
    return _model(studio)


def _model(studio: Studio) -> dict[str, object]:
    return {"id": studio.model_facts()["name"], "object": "model", "created": 0, "owned_by": "zimage"}


@router.post("/images/generations", openapi_extra=PICTURE_BODY)
async def generations(request: Request, studio: GivenStudio) -> Response:
    """Makes pictures, and answers when they are there. With stream, they come as events."""
    return await _answer(Asked("image_generation", await json_object(request)), studio, request)


@router.post("/images/edits")
async def edits(request: Request, studio: GivenStudio) -> Response:
    """Changes a picture. mask: its transparent parts change, or its white parts if it is opaque."""
    fields: JsonObject = {}
    async with request.form(max_files=4) as form:
        for name, value in form.multi_items():
            key = name.removesuffix("[]")
            if key in ("image", "mask", "control_image") and isinstance(value, UploadFile):
                if key in fields:
                    raise RefusedError(f"`{key}`: this model takes one picture")
                data = await value.read()
                _, fields[key] = await run_in_threadpool(studio.store.receive, data, f"`{key}`")
            elif key in fields or isinstance(value, UploadFile):
                raise RefusedError(f"`{key}` is given twice, or is a file")
            else:
                fields[key] = value
    if not isinstance(fields.get("image"), Mapping):
        raise RefusedError("`image` is missing: send a picture")
    return await _answer(Asked("image_edit", fields), studio, request)


@dataclass
class Asked:
    """A request of this interface."""

    event: str  # how its events begin
    fields: JsonObject

    def __post_init__(self) -> None:
        known = _OURS | _TAKEN | _IDLE
        if unknown := [name for name in self.fields if name not in known]:
            raise RefusedError(f"`{unknown[0]}` is not known: known are {', '.join(sorted(known))}")
        if self.fields.get("response_format") not in (None, "url", "b64_json"):
            raise RefusedError("`response_format` must be url or b64_json")
        if self.fields.get("background") == "transparent":
            raise RefusedError("`background` transparent: this model makes opaque pictures")

    @property
    def format(self) -> str:
        """Pillow's name of the format of the results."""
        return picture_format(self.fields.get("output_format") or "png")

    @property
    def wants_urls(self) -> bool:
        """Whether the results are to be URLs."""
        return self.fields.get("response_format") == "url"

    @property
    def streams(self) -> bool:
        """Whether the results are to come as events."""
        return self.fields.get("stream") in (True, "true", "True", "1")

    def partial(self) -> int:
        """The number of partial pictures to send."""
        text = str(self.fields.get("partial_images") or 0)
        if not text.isdecimal() or int(text) > _MOST_PARTIAL:
            raise RefusedError(f"`partial_images` must be between 0 and {_MOST_PARTIAL}")
        return int(text)

    def order(self, steps: int) -> dict[str, object]:
        """The fields of the own interface. steps: those of a picture, if the request does not say."""
        order = {name: value for name, value in self.fields.items() if name in _OURS and name not in ("image", "mask")}
        order["count"] = self.fields.get("n")
        size = self.fields.get("size")
        if size not in (None, "", "auto"):
            width, x, height = str(size).partition("x")
            if not (x and width.isdecimal() and height.isdecimal()):
                raise RefusedError("`size` must be WIDTHxHEIGHT, such as 512x512, or auto")
            order |= {"width": int(width), "height": int(height)}
        if picture := self.fields.get("image"):
            order["init_image"] = picture["id"]
            if picture["mask"]:
                order["mask"] = picture["mask"]
        mask = self.fields.get("mask")
        if mask is not None:
            order["mask"] = (mask["mask"] or mask["id"]) if isinstance(mask, Mapping) else mask
        followed = self.fields.get("control_image")
        if isinstance(followed, Mapping):
            order["control_image"] = followed["id"]
        if self.streams and self.partial():
            made = order.get("steps") or steps
            order["preview_steps"] = max(1, int(str(made)) // (self.partial() + 1)) if str(made).isdecimal() else 1
        return order

    def notes(self) -> list[str]:
        """What of the request changed nothing."""
        return [f"{name} is not used" for name in sorted(self.fields.keys() & _IDLE)]


async def _answer(asked: Asked, studio: Studio, request: Request) -> Response:
    _ = asked.format  # refused before any work
    order = asked.order(studio.usual_steps)
    job = await run_in_threadpool(lambda: studio.submit(with_ids(order, studio), client_of(request)))
    if asked.streams:
        return stream(_events(asked, job, studio))
    await finished(job, studio, request)
    if job.state is not State.DONE:
        return refusal(500 if job.state is State.FAILED else 499, job.error or "the job was cancelled")
    return JSONResponse(await run_in_threadpool(_results, asked, job, studio, str(request.base_url)))


def _results(asked: Asked, job: Job, studio: Studio, base: str) -> JsonObject:
    rows = job.pictures
    name = (asked.fields.get("output_format") or "png").lower()
    data = [
        {"url": f"{base}api/pictures/{row['id']}/file?format={name}"}
        if asked.wants_urls
        else {"b64_json": to_base64(studio.store.picture_bytes(row["id"], asked.format))}
        for row in rows
    ]
    seeds = [row["record"]["seed"] for row in rows]
    return {"created": int(job.created), "data": data, "output_format": _named(asked.format), "background": "opaque",
            "size": f"{rows[0]['width']}x{rows[0]['height']}", "seeds": seeds, "warnings": asked.notes()}  # fmt: skip


async def _events(asked: Asked, job: Job, studio: Studio) -> AsyncGenerator[str, None]:
    config, left, sent = job.order.configs[0], asked.partial(), 0
    common = {"created_at": int(job.created), "output_format": _named(asked.format), "background": "opaque",
              "quality": "auto", "size": f"{config.width or 'auto'}x{config.height or 'auto'}"}  # fmt: skip
    async for told in of_client(job, studio):
        if told.kind == "preview" and told.data and sent < left:
            data = await run_in_threadpool(reencoded, told.data, asked.format)
            kind = f"{asked.event}.partial_image"
            facts = {"type": kind, "b64_json": to_base64(data), "partial_image_index": sent, **common}
            sent += 1
            yield event_text(kind, facts)
    if job.state is not State.DONE:
        message = job.error or "the job was cancelled"
        yield event_text("error", {"error": {"message": message, "type": "server_error", "param": None, "code": None}})
        return
    for row in job.pictures:
        data = await run_in_threadpool(studio.store.picture_bytes, row["id"], asked.format)
        kind = f"{asked.event}.completed"
        size = f"{row['width']}x{row['height']}"
        yield event_text(kind, {**common, "type": kind, "b64_json": to_base64(data), "size": size, "usage": _TOKENS,
                                "seed": row["record"]["seed"], "warnings": asked.notes()})  # fmt: skip


def _named(format: str) -> str:
    return format.lower()
