"""The interface of AUTOMATIC1111's web UI, as its clients use it: /sdapi/v1.

Sources: modules/api/api.py and models.py of stable-diffusion-webui; Open WebUI's routers/images.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from zimage_ref.formats.json_file import JsonObject
from zimage_ref.generation.samplers import SAMPLERS
from zimage_ref.pictures.metadata import parameters
from zimage_ref.pictures.received import inverted, received
from zimage_serve.refusals import RefusedError
from zimage_serve.store.store import MOST_RECEIVED
from zimage_serve.work.jobs import Job, State
from zimage_serve.work.studio import Studio

from .bodies import from_base64, json_object, to_base64
from .errors import refusal
from .given import GivenStudio
from .given_pictures import kept
from .prompt_loras import split_loras
from .sd_control import SCRIPT, fields_of, scripts_of, unit_of
from .streams import client_of, finished

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
_FITS = {0: "stretch", 1: "crop", 2: "pad", 3: "stretch"}  # resize_mode
_RENAMED = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "width": "width", "height": "height", "steps": "steps",
    "cfg_scale": "guidance", "seed": "seed", "denoising_strength": "strength", "loras": "loras",
}  # fmt: skip
_CONTROL = ("control", "control_scale", "control_kind", "control_start", "control_end")  # as in the own interface
_ELSEWHERE = {
    *_CONTROL, "control_image", "alwayson_scripts",
    "init_images", "mask", "resize_mode", "inpainting_mask_invert", "batch_size", "n_iter", "sampler_name",
    "sampler_index", "send_images", "save_images", "include_init_images",
}  # fmt: skip
_USELESS: tuple[object, ...] = (None, "", 0, 0.0, -1, 1.0, False, [], {})  # values that ask for nothing
_PREVIEWS = 4  # of a picture, for `progress`


@router.post("/txt2img")
async def txt2img(request: Request, studio: GivenStudio) -> Response:
    """Makes pictures from a prompt."""
    asked = await json_object(request)
    if asked.get("init_images"):
        raise RefusedError("`init_images` belong to img2img")
    asked.pop("denoising_strength", None)  # of the second pass of other models
    return await _make(asked, {}, studio, request)


@router.post("/img2img")
async def img2img(request: Request, studio: GivenStudio) -> Response:
    """Changes a picture. White parts of the mask are painted anew."""
    asked = await json_object(request)
    pictures = asked.get("init_images")
    if not isinstance(pictures, list) or len(pictures) != 1:
        raise RefusedError("`init_images` must be a list of one picture in base64")
    start = await run_in_threadpool(_start, asked, pictures[0], studio)
    return await _make(asked, start, studio, request)


def _start(asked: Mapping[str, object], picture: object, studio: Studio) -> dict[str, object]:
    """The fields of the own interface for the picture to start from."""
    id, _ = studio.store.receive(from_base64(picture, "init_images"), "`init_images`")
    start: dict[str, object] = {"init_image": id}
    mode = asked.get("resize_mode") or 0
    if not isinstance(mode, int) or mode not in _FITS:
        raise RefusedError("`resize_mode` must be 0, 1, 2 or 3")
    start["fit"] = _FITS[mode]
    if asked.get("mask"):
        mask = received(from_base64(asked["mask"], "mask"), "`mask`", MOST_RECEIVED).picture
        start["mask"] = studio.store.keep(inverted(mask) if asked.get("inpainting_mask_invert") else mask)
    return start


async def _make(asked: JsonObject, start: Mapping[str, object], studio: Studio, request: Request) -> Response:
    order, notes = _order(asked, {**start, **await run_in_threadpool(_followed, asked, studio)}, studio)
    job = await run_in_threadpool(studio.submit, order, client_of(request))
    await finished(job, studio, request)
    if job.state is not State.DONE:
        return refusal(500, job.error or "the job was interrupted")
    return JSONResponse(await run_in_threadpool(_results, asked, job, studio, notes))


def _followed(asked: JsonObject, studio: Studio) -> dict[str, object]:
    """The fields of the own interface for the picture to follow. Given as such they count before those of a unit."""
    found = {name: asked[name] for name in _CONTROL if name in asked}
    if asked.get("control_image") is not None:
        found["control_image"] = kept(asked["control_image"], "control_image", studio)
    unit = unit_of(asked)
    return found if unit is None else {**fields_of(unit, studio), **found}


def _order(asked: JsonObject, start: Mapping[str, object], studio: Studio) -> tuple[dict[str, object], list[str]]:
    """The fields of the own interface, and notes on what is not used."""
    order: dict[str, object] = {ours: asked[theirs] for theirs, ours in _RENAMED.items() if theirs in asked} | dict(
        start
    )
    prompt, loras = split_loras(str(order.get("prompt", "")))
    order["prompt"], notes = prompt, []
    if loras:
        named = order.get("loras") or []
        if not isinstance(named, list):
            raise RefusedError("`loras` must be a list")
        order["loras"] = [*named, *loras]
    if order.get("guidance") == 1:  # no guidance, as these programs count it
        order["guidance"] = 0
    if not order.get("guidance", studio.usual_guidance) and order.pop("negative_prompt", None):
        notes.append("negative_prompt is not used without guidance: give cfg_scale above 1")
    counts = [asked.get(name) or 1 for name in ("batch_size", "n_iter")]
    if not all(isinstance(count, int) for count in counts):
        raise RefusedError("`batch_size` and `n_iter` must be whole numbers")
    order["count"] = counts[0] * counts[1]
    sampler = str(asked.get("sampler_name") or asked.get("sampler_index") or "euler").lower()
    order["sampler"] = sampler if sampler in SAMPLERS else "euler"
    if sampler not in SAMPLERS:
        notes.append(f"sampler {sampler} is not known: euler was used")
    steps = order.get("steps")
    order["preview_steps"] = max(1, (steps if isinstance(steps, int) else studio.usual_steps) // _PREVIEWS)
    notes += [f"script {name} is not used" for name in scripts_of(asked) if name != SCRIPT]
    for name, value in asked.items():
        if name not in _RENAMED and name not in _ELSEWHERE and (value is True or value not in _USELESS):
            notes.append(f"{name} is not used")
    return order, notes


def _results(asked: JsonObject, job: Job, studio: Studio, notes: list[str]) -> JsonObject:
    rows = job.pictures
    records = [row["record"] for row in rows]
    images = [to_base64(studio.store.picture_bytes(row["id"], "PNG")) for row in rows]
    texts = [parameters(record) for record in records]
    info = {
        "prompt": records[0]["prompt"], "all_prompts": [record["prompt"] for record in records],
        "negative_prompt": records[0].get("negative_prompt", ""), "seed": records[0]["seed"],
        "all_seeds": [record["seed"] for record in records], "width": rows[0]["width"], "height": rows[0]["height"],
        "sampler_name": records[0]["sampler"], "cfg_scale": records[0]["guidance"], "steps": records[0]["steps"],
        "batch_size": len(rows), "infotexts": texts, "warnings": notes,
    }  # fmt: skip
    shown = {name: value for name, value in asked.items() if name not in ("init_images", "mask")}
    return {"images": images if asked.get("send_images", True) else [], "parameters": shown, "info": json.dumps(info)}


@router.get("/progress")
def progress(studio: GivenStudio, skip_current_image: bool = False) -> dict[str, object]:
    """How far the picture in the making is, with its last preview."""
    running = studio.running()
    told = running[0].feed.latest("progress", stage="denoise") if running else None
    done, total = (int(str(told.facts[name])) for name in ("done", "total")) if told else (0, 0)
    seen = running[0].feed.latest("preview") if running and not skip_current_image else None
    return {
        "progress": done / total if total else 0.0, "eta_relative": 0.0,
        "state": {"job": running[0].id if running else "", "job_count": studio.status()["waiting"],
                  "sampling_step": done, "sampling_steps": total, "interrupted": False, "skipped": False},
        "current_image": to_base64(seen.data) if seen and seen.data else None, "textinfo": None,
    }  # fmt: skip


@router.post("/interrupt")
@router.post("/skip")
def interrupt(studio: GivenStudio) -> dict[str, object]:
    """Cancels the pictures in the making."""
    for job in studio.running():
        studio.cancel(job.id)
    return {}


@router.get("/options")
def options(studio: GivenStudio) -> dict[str, object]:
    """The settings that clients ask for: the name of the model."""
    return {"sd_model_checkpoint": studio.model_facts()["name"], "samples_format": "png"}


@router.post("/options")
async def set_options(request: Request, studio: GivenStudio) -> dict[str, object]:
    """Accepts the name of the model of this server. It has one model, and clients cannot change its settings."""
    name = (await json_object(request)).get("sd_model_checkpoint")
    known = studio.model_facts()["name"]
    if name not in (None, known):
        raise RefusedError(f"`sd_model_checkpoint`: this server has one model, {known}")
    return {}


@router.get("/sd-models")
def sd_models(studio: GivenStudio) -> list[dict[str, object]]:
    """The one model of this server."""
    name = studio.model_facts()["name"]
    return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}]


@router.get("/loras")
def loras(studio: GivenStudio) -> list[dict[str, object]]:
    """The LoRAs that <lora:NAME:SCALE> in a prompt can name."""
    names = [name.removesuffix(".safetensors") for name in studio.loras.names()]
    return [{"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}} for name in names]


@router.post("/refresh-loras")
@router.post("/refresh-checkpoints")
def refresh() -> dict[str, object]:
    """Nothing is to be done: folders are read whenever a client asks."""
    return {}


@router.get("/samplers")
def samplers() -> list[dict[str, object]]:
    """The samplers."""
    return [{"name": name, "aliases": [], "options": {}} for name in SAMPLERS]
