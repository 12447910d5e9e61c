"""The options of the server, each once. This file does not import FastAPI, so that help works without the extra."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from zimage_ref.bounds import SERVER, check_bounds
from zimage_ref.errors import ConfigError
from zimage_ref.generation.sizes import MAX_AREA
from zimage_ref.options import MEMORY, Group, check_choices, option

KEY_VARIABLE = "ZIMAGE_API_KEY"  # an environment variable, because other users of the machine can read command lines
WHILE_TRAINING = ("pause", "wait")


class ServeGroup(Group):
    """The groups of options of `zimage serve`."""

    MODEL = "Model"
    ADDRESS = "Address and access"
    FILES = "Files"
    LIMITS = "Limits"
    WORK = "Work"


_, ADDRESS, FILES, LIMITS, WORK = ServeGroup


@dataclass(frozen=True)
class ServeSettings:
    """The options of a server. Raises ConfigError for values out of bounds, and for an open address without a key."""

    host: str = option(
        "127.0.0.1",
        "Address to listen on. An address that other machines can reach needs `api_key`.",
        ADDRESS,
        essential=True,
    )
    port: int = option(7860, "Port to listen on. 0 takes a free one.", ADDRESS, essential=True)
    api_key: str = option(
        "",
        f"Key that clients must send. The environment variable {KEY_VARIABLE} sets it, too, and other users of the "
        "machine do not see that.",
        ADDRESS,
        essential=True,
        value="KEY",
    )
    allow_host: tuple[str, ...] = option(
        (),
        "Name under which clients may reach the server, such as that of a proxy. You can repeat this option.",
        ADDRESS,
        value="NAME",
        repeatable=True,
    )
    folder: Path = option(
        Path("zimage-studio"), "Folder for pictures, LoRAs, datasets and training runs.", FILES, essential=True
    )
    lora_dir: Path | None = option(
        None, "Folder of LoRAs. With auto, loras in `folder`.", FILES, auto=True, essential=True
    )
    control_dir: Path | None = option(None, "Folder of ControlNets. With auto, controls in `folder`.", FILES, auto=True)
    queue_size: int = option(64, "Most requests that wait. Others are told to come back later.", LIMITS)
    max_pixels: int = option(MAX_AREA, "Most pixels of a picture.", LIMITS)
    max_steps: int = option(100, "Most denoising steps of a picture.", LIMITS)
    max_count: int = option(10, "Most pictures of one request.", LIMITS)
    max_upload_mb: int = option(64, "Largest body of a request, in MB.", LIMITS)
    max_lora_mb: int = option(2048, "Largest LoRA that can be uploaded, in MB.", LIMITS)
    batch_size: int = option(
        1,
        "Pictures of equal settings that are denoised together. More than 1 can change the last bit of a pixel.",
        WORK,
    )
    memory: str = option(
        MEMORY[0],
        "lean holds one network at a time, fast holds all, stream only the blocks at work. auto takes the first of "
        "fast, lean and stream that fits.",
        WORK,
        choices=MEMORY,
    )
    idle_minutes: float = option(
        10.0, "Minutes without work after which the model leaves memory. 0 keeps it.", WORK, essential=True
    )
    while_training: str = option(
        WHILE_TRAINING[0],
        "Pictures during training: pause saves and pauses the run while they are made, wait lets them wait.",
        WORK,
        choices=WHILE_TRAINING,
        essential=True,
    )

    def __post_init__(self) -> None:
        check_bounds(self, SERVER)
        check_choices(self)
        if not self.is_local and not self.api_key:
            raise ConfigError(
                f"`host` {self.host} can be reached from other machines: give `api_key`, or set {KEY_VARIABLE} in the "
                f"environment"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def loras(self) -> Path:
        """The folder of LoRAs."""
        return self.lora_dir or self.folder / "loras"

    @property
    def controls(self) -> Path:
        """The folder of ControlNets."""
        return self.control_dir or self.folder / "controls"


def is_loopback(host: str) -> bool:
    """Whether `host` is localhost or an address such as 127.0.0.1."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
