"""The server's own interface for training runs."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from zimage_ref.pictures.formats import PICTURE_SUFFIXES
from zimage_serve.store.names import file_in
from zimage_serve.work.runs import measurements

from .bodies import json_object
from .given import RUN_BODY, GivenStudio
from .streams import events, stream

router = APIRouter(prefix="/api/runs", tags=["training"])


@router.get("")
def runs(studio: GivenStudio) -> list[dict[str, object]]:
    """All runs, the newest first."""
    return [run.facts() for run in studio.runs.all()]


@router.post("/plan", openapi_extra=RUN_BODY)
async def plan(request: Request, studio: GivenStudio) -> dict[str, object]:
    """What a run would do: pictures, sizes, steps, memory, warnings. Nothing is started."""
    return await run_in_threadpool(studio.runs.plan, await json_object(request))


@router.get("/presets")
def presets(studio: GivenStudio) -> list[dict[str, object]]:
    """Sets of options to begin with."""
    return studio.runs.presets(studio.engines.training)


@router.post("", status_code=202, openapi_extra=RUN_BODY)
async def start(request: Request, studio: GivenStudio) -> dict[str, object]:
    """Starts a run, as soon as the machine is free."""
    run = await run_in_threadpool(studio.runs.start, await json_object(request))
    return run.facts()


@router.get("/{id}")
def run(id: str, studio: GivenStudio) -> dict[str, object]:
    """The state of a run, and the LoRAs that it has saved."""
    return studio.runs.find(id).facts()


@router.post("/{id}/stop")
def stop(id: str, studio: GivenStudio) -> dict[str, object]:
    """Saves the state after the step, and stops."""
    return studio.runs.stop(id).facts()


@router.post("/{id}/resume")
def resume(id: str, studio: GivenStudio) -> dict[str, object]:
    """Continues a stopped run. The result is the same as without the stop."""
    return studio.runs.resume(id).facts()


@router.get("/{id}/events")
async def follow(id: str, request: Request, studio: GivenStudio) -> Response:
    """The events of a run, server-sent: running, prepared, begun, step, held_out, preview, saved, paused, the end."""
    return stream(events(studio.runs.find(id).feed, request))


@router.get("/{id}/metrics")
def metrics(id: str, studio: GivenStudio) -> list[dict[str, object]]:
    """All measurements of a run: losses of steps, held-out losses, previews."""
    return measurements(studio.runs.find(id))


@router.get("/{id}/previews/{name}")
def preview(id: str, name: str, studio: GivenStudio) -> FileResponse:
    """A preview of a run, by the name in its measurements."""
    return FileResponse(file_in(studio.runs.find(id).folder.previews, name, "preview", PICTURE_SUFFIXES))
