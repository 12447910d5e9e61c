"""The application: all interfaces behind one layer of safety."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from zimage_ref.version import __version__
from zimage_serve.refusals import RefusedError
from zimage_serve.work.studio import Studio

from . import dataset_api, library_api, lora_api, openai_api, page, picture_api, reference, run_api, sd_control, sdapi
from .access import COOKIE, Gate
from .bodies import json_object
from .errors import answer_errors, refusal
from .safety import Safety


@dataclass(frozen=True)
class Addition:
    """Another application, which answers at one path."""

    path: str
    app: ASGIApp
    run: Callable[[], AbstractAsyncContextManager[None]]  # a block in which it works


def application(studio: Studio, addition: Addition | None = None) -> ASGIApp:
    """The ASGI application of `studio`, with an `addition` at its path."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with addition.run() if addition else nullcontext():
            yield

    app = FastAPI(
        lifespan=life, title="zimage serve", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.studio = studio
    answer_errors(app)
    for interface in (picture_api, library_api, lora_api, dataset_api, run_api, openai_api, sdapi, sd_control):
        app.include_router(interface.router)
    for path, function in (("/docs", docs), ("/docs/style.css", style), ("/health", health)):
        app.add_api_route(path, function, include_in_schema=False)
    for path in page.PATHS:
        app.add_api_route(path, page_file, include_in_schema=False)
    app.add_api_route("/login", login, methods=["POST"], include_in_schema=False)
    both = _Fork(app, addition) if addition else app
    return Safety(both, studio.settings, studio.closing.is_set)


@dataclass(frozen=True)
class _Fork:
    """Passes requests for one path to another application."""

    app: ASGIApp
    addition: Addition

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        other = scope["type"] == "http" and scope["path"] == self.addition.path
        await (self.addition.app if other else self.app)(scope, receive, send)


def page_file(request: Request) -> Response:
    """A file of the page for people."""
    return page.answer(request.url.path)


def docs(request: Request) -> Response:
    """The page of all interfaces."""
    return HTMLResponse(reference.page(request.app.openapi()))


def style() -> Response:
    """The style of the page of interfaces."""
    return Response(reference.STYLE, media_type="text/css")


def health() -> dict[str, str]:
    """Says that the server answers. It says nothing else, because anybody may ask."""
    return {"status": "ok"}


async def login(request: Request) -> Response:
    """Gives a browser that sends {"key": ...} a cookie that stands for the key."""
    asked = await json_object(request)
    gate = Gate(request.app.state.studio.settings)
    key = asked.get("key")
    if not isinstance(key, str):
        raise RefusedError("`key` is missing")
    if not gate.is_key(key):
        return refusal(401, "this is not the API key")
    answer = JSONResponse({"status": "ok"})
    answer.set_cookie(COOKIE, gate.session(), httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return answer
