"""LoRAs named in a prompt, as AUTOMATIC1111's clients write them: <lora:NAME:SCALE>."""

from __future__ import annotations

import re

_TAG = re.compile(r"<lora:([^:<>]+)(?::([^<>]*))?>")


def split_loras(prompt: str) -> tuple[str, list[dict[str, object]]]:
    """The prompt without the tags, and the LoRAs of the tags."""
    found: list[dict[str, object]] = [{"name": name, "scale": scale or "1"} for name, scale in _TAG.findall(prompt)]
    return " ".join(_TAG.sub(" ", prompt).split()) if found else prompt, found
