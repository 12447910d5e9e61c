"""The server's own interface for pictures: jobs, their events, uploads, the gallery."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, File, Query, Request, UploadFile
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response

from zimage_ref.formats.json_file import JsonObject
from zimage_serve.refusals import UnknownError
from zimage_serve.work.jobs import Job

from .bodies import MEDIA, json_object, picture_format
from .given import PICTURE_BODY, GivenStudio
from .streams import client_of, event_text, events, of_client, stream

router = APIRouter(prefix="/api")
_FOREVER = {"cache-control": "private, max-age=31536000, immutable"}  # an id never names another picture
_MOST_LISTED = 200


@router.get("/model", tags=["server"])
def model(studio: GivenStudio) -> dict[str, object]:
    """The model, its defaults, and the limits of this server."""
    return studio.model_facts()


@router.get("/status", tags=["server"])
def status(studio: GivenStudio) -> dict[str, object]:
    """Waiting and running jobs, the run that trains, whether the model is loaded."""
    return studio.status()


@router.post("/jobs", tags=["jobs"], status_code=202, openapi_extra=PICTURE_BODY)
async def make(request: Request, studio: GivenStudio) -> JSONResponse:
    """Queues a job. Follow its events, or ask for its state."""
    asked = await json_object(request)
    job = await run_in_threadpool(studio.submit, asked, client_of(request))
    facts = await run_in_threadpool(studio.job_facts, job.id)
    return JSONResponse(facts, 202, {"location": f"/api/jobs/{job.id}"})


@router.get("/jobs", tags=["jobs"])
def jobs(studio: GivenStudio, limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = 50) -> list[dict[str, object]]:
    """The last jobs, the newest first."""
    return studio.last_jobs(limit)


@router.get("/jobs/{id}", tags=["jobs"])
def job(id: str, studio: GivenStudio) -> dict[str, object]:
    """The state of a job."""
    return studio.job_facts(id)


@router.delete("/jobs/{id}", tags=["jobs"])
def cancel(id: str, studio: GivenStudio) -> dict[str, object]:
    """Cancels a job. A job that has ended does not change."""
    studio.cancel(id)
    return studio.job_facts(id)


@router.get("/jobs/{id}/events", tags=["jobs"])
async def follow(id: str, request: Request, studio: GivenStudio, cancel_on_leave: bool = False) -> Response:
    """The events of a job, server-sent: queued, started, progress, preview, picture, and its end.

    With cancel_on_leave, the job is cancelled if you close the stream before its end.
    """
    found = studio.job(id)
    if found is None:
        facts = await run_in_threadpool(studio.job_facts, id)
        return stream(_over(facts))
    if cancel_on_leave:
        return stream(_owned(found, studio))
    return stream(events(found.feed, request))


async def _over(facts: dict[str, object]) -> AsyncGenerator[str, None]:
    yield event_text(str(facts["state"]), facts)


async def _owned(job: Job, studio: GivenStudio) -> AsyncGenerator[str, None]:
    async for told in of_client(job, studio):
        yield event_text(told.kind, told.facts, told.number)


@router.get("/jobs/{id}/preview", tags=["jobs"])
def preview(id: str, studio: GivenStudio, place: int = 0) -> Response:
    """The last preview of a picture of a running job, as a JPEG. place: of the picture in the job, from 0."""
    found = studio.job(id)
    told = found.feed.latest("preview", place=place) if found else None
    if told is None or told.data is None:
        raise UnknownError("preview: this job has none now")
    return Response(told.data, media_type="image/jpeg")


@router.post("/uploads", tags=["uploads"], status_code=201)
def upload(file: Annotated[UploadFile, File()], studio: GivenStudio) -> JsonObject:
    """Keeps a picture, to start from it or to use it as a mask. Returns its id. mask: of its transparent parts."""
    return studio.store.receive(file.file.read(), "the upload")[1]


@router.get("/uploads/{id}", tags=["uploads"])
def uploaded(id: str, studio: GivenStudio) -> FileResponse:
    """A picture that was uploaded, as a PNG."""
    return FileResponse(studio.store.upload_path(id, "upload"), media_type="image/png", headers=_FOREVER)


@router.get("/pictures", tags=["gallery"])
def pictures(
    studio: GivenStudio,
    search: Annotated[str, Query(max_length=200)] = "",
    before: Annotated[str, Query(max_length=64)] = "",
    limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = 50,
) -> list[JsonObject]:
    """The gallery, the newest first. search: words of the prompt. before: the last id that you have."""
    return studio.store.database.pictures(search, before, limit)


@router.get("/pictures/{id}", tags=["gallery"])
def picture(id: str, studio: GivenStudio) -> JsonObject:
    """A picture's facts and its record, which says how it was made."""
    return studio.store.picture(id)


@router.get("/pictures/{id}/file", tags=["gallery"])
def picture_file(id: str, studio: GivenStudio, format: str = "png", download: bool = False) -> Response:
    """A picture with its record, as png, jpeg or webp."""
    kind = picture_format(format)
    row, headers = studio.store.picture(id), dict(_FOREVER)
    if download:
        headers["content-disposition"] = f'attachment; filename="zimage-{row["id"]}.{format.lower()}"'
    return Response(studio.store.picture_bytes(id, kind), media_type=MEDIA[kind], headers=headers)


@router.get("/pictures/{id}/thumbnail", tags=["gallery"])
def picture_thumbnail(id: str, studio: GivenStudio) -> Response:
    """A picture as a small JPEG."""
    return Response(studio.store.thumbnail(id), media_type="image/jpeg", headers=_FOREVER)


@router.delete("/pictures/{id}", tags=["gallery"], status_code=204)
def delete_picture(id: str, studio: GivenStudio) -> None:
    """Deletes a picture."""
    studio.store.delete_picture(id)
