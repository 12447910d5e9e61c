"""The server's own interface for LoRAs, ControlNets and datasets."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from .bodies import json_object
from .given import GivenStudio

router = APIRouter(prefix="/api")


@router.get("/loras", tags=["LoRAs"])
def loras(studio: GivenStudio) -> list[dict[str, object]]:
    """All LoRAs, with facts from their headers. problem: why one cannot be used."""
    return [studio.loras.facts(name) for name in studio.loras.names()]


@router.post("/loras", tags=["LoRAs"], status_code=201)
def upload(
    file: Annotated[UploadFile, File()], studio: GivenStudio, name: Annotated[str, Form()] = ""
) -> dict[str, object]:
    """Keeps a LoRA, a .safetensors file that fits the model. name: instead of the name of the file."""
    return studio.loras.receive(name or file.filename, file.file)


@router.get("/loras/{name}", tags=["LoRAs"])
def inspect(name: str, studio: GivenStudio) -> dict[str, object]:
    """Facts about a LoRA, and how much it changes each module."""
    return studio.loras.inspect(name)


@router.patch("/loras/{name}", tags=["LoRAs"])
async def rename(name: str, request: Request, studio: GivenStudio) -> dict[str, object]:
    """Renames a LoRA: a JSON object with its new `name`."""
    asked = await json_object(request)
    return await run_in_threadpool(studio.loras.rename, name, asked.get("name"))


@router.get("/loras/{name}/file", tags=["LoRAs"])
def download(name: str, studio: GivenStudio) -> FileResponse:
    """A LoRA file."""
    path = studio.loras.path(name)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.delete("/loras/{name}", tags=["LoRAs"], status_code=204)
def delete(name: str, studio: GivenStudio) -> None:
    """Deletes a LoRA."""
    studio.loras.delete(name)


@router.get("/controls", tags=["ControlNets"])
def controls(studio: GivenStudio) -> list[dict[str, object]]:
    """All ControlNets. problem: why one cannot be used."""
    return [studio.controls.facts(name) for name in studio.controls.names()]


@router.get("/datasets", tags=["datasets"])
def datasets(studio: GivenStudio) -> list[str]:
    """The names of all datasets."""
    return studio.datasets.names()


@router.put("/datasets/{name}", tags=["datasets"], status_code=201)
def make_dataset(name: str, studio: GivenStudio) -> dict[str, object]:
    """Makes an empty dataset."""
    return studio.datasets.facts(studio.datasets.make(name))


@router.get("/datasets/{name}", tags=["datasets"])
def dataset(name: str, studio: GivenStudio) -> dict[str, object]:
    """The pictures of a dataset, with sizes and captions."""
    return studio.datasets.facts(name)


@router.delete("/datasets/{name}", tags=["datasets"], status_code=204)
def delete_dataset(name: str, studio: GivenStudio) -> None:
    """Deletes a dataset with its pictures."""
    studio.datasets.delete(name)


@router.post("/datasets/{name}/pictures", tags=["datasets"], status_code=201)
def add_picture(
    name: str, file: Annotated[UploadFile, File()], studio: GivenStudio, caption: Annotated[str, Form()] = ""
) -> dict[str, object]:
    """Adds a picture with its caption."""
    return studio.datasets.add(name, file.filename or "picture", file.file.read(), caption)


@router.patch("/datasets/{name}/captions", tags=["datasets"])
async def captions(name: str, request: Request, studio: GivenStudio) -> dict[str, object]:
    """Writes captions: a JSON object of names of pictures and captions. An empty caption is deleted."""
    await run_in_threadpool(studio.datasets.caption, name, await json_object(request))
    return await run_in_threadpool(studio.datasets.facts, name)


@router.get("/datasets/{name}/pictures/{picture}", tags=["datasets"])
def picture_file(name: str, picture: str, studio: GivenStudio) -> FileResponse:
    """A picture of a dataset."""
    return FileResponse(studio.datasets.picture(name, picture))


@router.get("/datasets/{name}/pictures/{picture}/thumbnail", tags=["datasets"])
def picture_thumbnail(name: str, picture: str, studio: GivenStudio) -> Response:
    """A picture of a dataset as a small JPEG."""
    return Response(studio.datasets.thumbnail(name, picture), media_type="image/jpeg")


@router.delete("/datasets/{name}/pictures/{picture}", tags=["datasets"], status_code=204)
def remove_picture(name: str, picture: str, studio: GivenStudio) -> None:
    """Deletes a picture of a dataset and its caption."""
    studio.datasets.remove(name, picture)
