"""One prompt after another with the model kept loaded, and commands that change what comes next."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Protocol, get_type_hints

from zimage_ref import ConfigError, GenerateConfig, ZImageError
from zimage_ref.generation.jobs import Request
from zimage_ref.options_file import typed

from ..terminal.console import Console
from ..terminal.options import path_and_scale

HELP = """A line is a prompt. A line that begins with / changes what the next pictures are like:
  /size 1024x768        width and height; /size alone: the default
  /steps 8              also /seed /guidance /negative-prompt /sampler /shift /init-image /strength /mask /fit ...
  /steps                without a value: the default
  /lora fox.safetensors:0.8, more.safetensors    the LoRAs to use; /lora alone: none
  /show                 what is set
  /quit                 or the end of the input; Ctrl-C stops a picture under way"""
_HINTS = get_type_hints(GenerateConfig)
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(GenerateConfig)}


class Maker(Protocol):
    """What the loop needs of a run."""

    loras: list[Any]
    names: Any

    def use_loras(self, loras: Any) -> None: ...

    def plan(self, configs: Any) -> list[Request]: ...

    def make(self, requests: Any, paths: Any) -> None: ...


def loop(run: Maker, config: GenerateConfig, console: Console) -> None:
    """Reads lines until the input ends; an error is one line, and nothing is lost by it."""
    console.note("a prompt makes a picture; /help lists the commands")
    while True:
        try:
            line = console.ask("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/quit", "/exit"):
            return
        try:
            config = _take(line, run, config, console)
        except ZImageError as error:
            console.error(str(error))
        except KeyboardInterrupt:
            console.note("stopped")


def _take(line: str, run: Maker, config: GenerateConfig, console: Console) -> GenerateConfig:
    """Does what the line says; returns the config that the next line starts from."""
    if not line:
        return config
    if line.startswith("/"):
        return _command(line, run, config, console)
    wanted = replace(config, prompt=line)
    run.make(run.plan([wanted]), [run.names.free(wanted)])
    return config


def _command(line: str, run: Maker, config: GenerateConfig, console: Console) -> GenerateConfig:
    name, _, value = line[1:].partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if name == "help":
        console.note(HELP)
    elif name == "show":
        values = {key: getattr(config, key) for key in _DEFAULTS if key != "prompt"}
        loras = ", ".join(f"{path} x {scale:g}" for path, scale in run.loras) or "none"
        console.facts("next", {key: v for key, v in values.items() if v is not None} | {"LoRA": loras})
    elif name == "lora":
        run.use_loras([path_and_scale(part.strip()) for part in value.split(",") if part.strip()])
    elif name == "size":
        width, _, height = value.partition("x")
        config = _set(_set(config, "width", width), "height", height)
    elif name in _DEFAULTS and name != "prompt":
        config = _set(config, name, value)
    else:
        raise ConfigError(f"/{name} is unknown: /help lists the commands")
    return config


def _set(config: GenerateConfig, name: str, value: str) -> GenerateConfig:
    known = typed(value, _HINTS[name], f"/{name}") if value else _DEFAULTS[name]
    return replace(config, **{name: known})
