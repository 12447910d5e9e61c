"""Answers that last: server-sent events, and waiting for a job of a client that may leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.responses import StreamingResponse

from zimage_serve.work.feed import Feed, Told
from zimage_serve.work.jobs import Job
from zimage_serve.work.studio import Studio

_BEAT = 10.0  # seconds of silence after which a stream shows that it lives
_LOOK = 0.2  # seconds between two looks whether the client is there
_SHORTEST, _LONGEST = 1, 64  # characters of the name of a client


def client_of(request: Request) -> str:
    """Whose turn a request takes: X-Client if the client sends it, else its address and program."""
    named = request.headers.get("x-client", "")
    if _SHORTEST <= len(named) <= _LONGEST:
        return f"x {named}"
    address = request.client.host if request.client else ""
    return f"{address} {request.headers.get('user-agent', '')[:_LONGEST]}"


def event_text(kind: str, facts: object, number: int | None = None) -> str:
    """One server-sent event. Source: HTML Living Standard, server-sent events."""
    lines = [] if number is None else [f"id: {number}"]
    return "\n".join([*lines, f"event: {kind}", f"data: {json.dumps(facts)}", "", ""])


def stream(texts: AsyncGenerator[str, None]) -> StreamingResponse:
    """A stream of events, with signs of life while it is silent."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_alive(texts), media_type="text/event-stream", headers=headers)


async def _alive(texts: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """`texts`, with a comment whenever none came for a while."""
    waiting: asyncio.Future[str] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(_next(texts))
            done, _ = await asyncio.wait({waiting}, timeout=_BEAT)
            if not done:
                yield ": still here\n\n"
                continue
            text, waiting = waiting.result(), None
            if not text:
                return
            yield text
    finally:
        if waiting:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await texts.aclose()


async def _next(texts: AsyncGenerator[str, None]) -> str:
    """The next text, "" after the last."""
    try:
        return await anext(texts)
    except StopAsyncIteration:
        return ""


async def events(feed: Feed, request: Request) -> AsyncGenerator[str, None]:
    """The events of `feed` as texts. A client that comes back gets those after its Last-Event-ID."""
    last = request.headers.get("last-event-id", "0")
    async for told in feed.follow(int(last) if last.isdecimal() else 0):
        yield event_text(told.kind, told.facts, told.number)


async def of_client(job: Job, studio: Studio) -> AsyncGenerator[Told, None]:
    """The events of a job. If the client leaves before the end, the job is cancelled."""
    try:
        async for told in job.feed.follow():
            yield told
    finally:
        if not job.ended.is_set():
            studio.cancel(job.id)


async def finished(job: Job, studio: Studio, request: Request) -> None:
    """Waits until `job` has ended. If the client leaves, the job is cancelled."""

    async def wait() -> None:
        async for _ in job.feed.follow():
            pass

    waiting = asyncio.ensure_future(wait())
    try:
        while not (await asyncio.wait({waiting}, timeout=_LOOK))[0]:
            if await request.is_disconnected():
                return
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        if not job.ended.is_set():
            studio.cancel(job.id)
