"""Tools for agents, by the Model Context Protocol (extra `mcp`): over HTTP at /mcp, or through stdin and stdout.

Source: the official Python SDK, mcp.server.mcpserver.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Annotated, TypeAlias

from anyio import to_thread
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import Field

from zimage_ref.errors import ZImageError
from zimage_serve.work.jobs import Job, State
from zimage_serve.work.studio import Studio

from .app import Addition
from .given_pictures import with_ids
from .streams import of_client

PATH = "/mcp"
_CLIENT = "agent"

Tool: TypeAlias = Callable[..., Awaitable[object]]
Prompt = Annotated[str, Field(description="Text that describes the picture.")]
Side = Annotated[int | None, Field(description="In pixels, a multiple of 16.")]
Seed = Annotated[int | None, Field(description="The same seed gives the same picture.")]
LoRAs = Annotated[list[str] | None, Field(description="Names of LoRAs, see list_loras.")]
Strength = Annotated[float | None, Field(description="How much of the picture changes, 0 to 1.")]


def _told(tool: Tool) -> Tool:
    """`tool`, with errors of the library told to the agent. The SDK hides all others."""

    @wraps(tool)
    async def telling(*values: object, **named: object) -> object:
        try:
            return await tool(*values, **named)
        except ZImageError as error:
            raise ToolError(str(error)) from error

    return telling


class Tools:
    """The tools. Each is one method; its docstring tells the agent what it does."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def server(self) -> MCPServer:
        """A server with all tools."""
        server = MCPServer(
            "zimage",
            log_level="WARNING",
            instructions="Makes pictures with Z-Image, changes pictures, and trains LoRAs.",
        )
        for tool in (self.generate, self.edit, self.list_loras, self.train, self.status):
            server.add_tool(_told(tool))
        return server

    async def generate(
        self,
        prompt: Prompt,
        width: Side = None,
        height: Side = None,
        seed: Seed = None,
        loras: LoRAs = None,
        control: Annotated[str | None, Field(description="Name of a ControlNet, see status.")] = None,
        control_image: Annotated[str | None, Field(description="Picture to follow: its id, or base64.")] = None,
    ) -> list[Image | str]:
        """Makes a picture from a prompt. With `control` it follows another. The answer is the picture and its id."""
        asked: dict[str, object] = {
            "prompt": prompt, "width": width, "height": height, "seed": seed, "loras": loras, "control": control,
            "control_image": control_image,
        }  # fmt: skip
        return await self._made(asked)

    async def edit(
        self,
        prompt: Prompt,
        picture: Annotated[str, Field(description="Id of a picture that generate made, or a picture in base64.")],
        strength: Strength = None,
        mask: Annotated[str | None, Field(description="Id or base64. White parts change.")] = None,
        seed: Seed = None,
    ) -> list[Image | str]:
        """Changes a picture as the prompt says. The answer is the new picture and its id."""
        asked: dict[str, object] = {"prompt": prompt, "strength": strength, "seed": seed}
        return await self._made({**asked, "init_image": picture, "mask": mask})

    async def list_loras(self) -> list[dict[str, object]]:
        """Lists the LoRAs of this server, with their trigger words."""
        shelf = self._studio.loras
        return await to_thread.run_sync(lambda: [shelf.facts(name) for name in shelf.names()])

    async def train(
        self,
        name: Annotated[str, Field(description="Name of the LoRA to make.")],
        dataset: Annotated[str, Field(description="Name of a dataset of this server.")],
        trigger: Annotated[str, Field(description="Words that call up the new thing in prompts.")] = "",
        steps: Annotated[int | None, Field(description="Training steps.")] = None,
    ) -> dict[str, object]:
        """Starts training a LoRA on a dataset of this server. Ask status how far it is."""
        asked = {"name": name, "dataset": dataset, "trigger": trigger, "steps": steps}
        return (await to_thread.run_sync(self._studio.runs.start, asked)).facts()

    async def status(self) -> dict[str, object]:
        """Says what the server does now, how far training is, and what the model can draw."""
        return await to_thread.run_sync(self._state)

    def _state(self) -> dict[str, object]:
        studio = self._studio
        runs, datasets = [run.facts() for run in studio.runs.all()], studio.datasets.names()
        return {
            **studio.status(), "model": studio.model_facts(), "runs": runs, "datasets": datasets,
            "controls": [studio.controls.facts(name) for name in studio.controls.names()],
        }  # fmt: skip

    def _submitted(self, asked: dict[str, object]) -> Job:
        return self._studio.submit(with_ids(asked, self._studio), _CLIENT)

    async def _made(self, asked: dict[str, object]) -> list[Image | str]:
        job: Job = await to_thread.run_sync(self._submitted, asked)
        async for _ in of_client(job, self._studio):
            pass
        if job.state is not State.DONE:
            raise ToolError(job.error or "the job was cancelled")
        row = job.pictures[0]
        data = await to_thread.run_sync(self._studio.store.picture_bytes, row["id"], "PNG")
        return [Image(data=data, format="png"), f"id {row['id']}, seed {row['record']['seed']}"]


def addition(studio: Studio) -> Addition:
    """The tools over HTTP, without sessions. The layer of safety is before it, so the SDK need not check hosts."""
    server = Tools(studio).server()
    app = server.streamable_http_app(
        streamable_http_path=PATH, stateless_http=True, json_response=True,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
        max_request_body_size=studio.settings.max_upload_mb * 10**6,
    )  # fmt: skip
    return Addition(PATH, app, server.session_manager.run)


def serve_stdio(studio: Studio) -> None:
    """Serves one agent through stdin and stdout until it closes stdin."""
    Tools(studio).server().run("stdio")
