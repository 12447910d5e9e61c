"""The tools of agents, called by the official SDK's client, over HTTP and through stdin and stdout."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from PIL import Image
from support.serving import serving

pytestmark = pytest.mark.oracle
TOOLS = {"generate", "edit", "list_loras", "train", "status"}


async def session_of(client: Any) -> None:
    """An agent's way: what tools there are, a picture, the picture changed, what the server knows."""
    async with client:
        assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
        made = await client.call_tool("generate", {"prompt": "a red star", "width": 32, "height": 32, "seed": 3})
        assert not made.is_error, made.content
        picture, said = made.content
        assert Image.open(io.BytesIO(base64.b64decode(picture.data))).size == (32, 32)
        id = said.text.split(",")[0].removeprefix("id ")
        for start in (id, picture.data):
            changed = await client.call_tool("edit", {"prompt": "blue", "picture": start, "strength": 0.5})
            assert changed.content[0].type == "image", changed.content
        refused = await client.call_tool("generate", {"prompt": "x", "width": 33})
        assert refused.is_error and "multiple of 16" in refused.content[0].text
        status = await client.call_tool("status", {})
        assert not status.is_error and "tiny" in str(status.content)
        assert not (await client.call_tool("list_loras", {})).is_error
        wrong = await client.call_tool("train", {"name": "x", "dataset": "../.."})
        assert wrong.is_error and "a name is 1 to 100" in wrong.content[0].text


def test_an_agent_over_http(tmp_path: Path) -> None:
    mcp = pytest.importorskip("mcp")
    with serving(tmp_path) as served:
        anyio.run(session_of, mcp.Client(f"{served.url}/mcp"))
        foreign = {"origin": "http://evil.com", "accept": "application/json"}
        assert httpx.post(f"{served.url}/mcp", json={}, headers=foreign, trust_env=False).status_code == 403


def test_an_agent_that_starts_the_server_itself(tmp_path: Path) -> None:
    mcp = pytest.importorskip("mcp")
    stdio = pytest.importorskip("mcp.client.stdio")
    argv = ["-m", "zimage_cli", "serve", "--mcp", f"--folder={tmp_path}"]
    anyio.run(session_of, mcp.Client(stdio.stdio_client(mcp.StdioServerParameters(command=sys.executable, args=argv))))
