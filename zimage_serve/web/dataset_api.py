"""The server's own interface for datasets."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from .bodies import json_object
from .given import GivenStudio

router = APIRouter(prefix="/api/datasets", tags=["datasets"])


@router.get("")
def datasets(studio: GivenStudio) -> list[str]:
    """The names of all datasets."""
    return studio.datasets.names()


@router.put("/{name}", status_code=201)
def make_dataset(name: str, studio: GivenStudio) -> dict[str, object]:
    """Makes an empty dataset."""
    return studio.datasets.facts(studio.datasets.make(name))


@router.get("/{name}")
def dataset(name: str, studio: GivenStudio) -> dict[str, object]:
    """The pictures of a dataset, with sizes and captions."""
    return studio.datasets.facts(name)


@router.delete("/{name}", status_code=204)
def delete_dataset(name: str, studio: GivenStudio) -> None:
    """Deletes a dataset with its pictures."""
    studio.datasets.delete(name)


@router.post("/{name}/pictures", status_code=201)
def add_picture(
    name: str, file: Annotated[UploadFile, File()], studio: GivenStudio, caption: Annotated[str, Form()] = ""
) -> dict[str, object]:
    """Adds a picture with its caption."""
    return studio.datasets.add(name, file.filename or "picture", file.file.read(), caption)


@router.patch("/{name}/captions")
async def captions(name: str, request: Request, studio: GivenStudio) -> dict[str, object]:
    """Writes captions: a JSON object of names of pictures and captions. An empty caption is deleted."""
    await run_in_threadpool(studio.datasets.caption, name, await json_object(request))
    return await run_in_threadpool(studio.datasets.facts, name)


@router.get("/{name}/pictures/{picture}")
def picture_file(name: str, picture: str, studio: GivenStudio) -> FileResponse:
    """A picture of a dataset."""
    return FileResponse(studio.datasets.picture(name, picture))


@router.get("/{name}/pictures/{picture}/thumbnail")
def picture_thumbnail(name: str, picture: str, studio: GivenStudio) -> Response:
    """A picture of a dataset as a small JPEG."""
    return Response(studio.datasets.thumbnail(name, picture), media_type="image/jpeg")


@router.delete("/{name}/pictures/{picture}", status_code=204)
def remove_picture(name: str, picture: str, studio: GivenStudio) -> None:
    """Deletes a picture of a dataset and its caption."""
    studio.datasets.remove(name, picture)


@router.put("/{name}/pictures/{picture}/mask")
def set_mask(name: str, picture: str, file: Annotated[UploadFile, File()], studio: GivenStudio) -> dict[str, object]:
    """Gives a picture a mask of its size. White parts are learned, if the run's `mask` is file."""
    return studio.datasets.set_mask(name, picture, file.file.read())


@router.get("/{name}/pictures/{picture}/mask")
def mask_file(name: str, picture: str, studio: GivenStudio) -> FileResponse:
    """The mask of a picture."""
    return FileResponse(studio.datasets.mask(name, picture))


@router.delete("/{name}/pictures/{picture}/mask")
def remove_mask(name: str, picture: str, studio: GivenStudio) -> dict[str, object]:
    """Deletes the mask of a picture."""
    return studio.datasets.remove_mask(name, picture)
