"""The server's own interface for LoRAs and ControlNets."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse

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
