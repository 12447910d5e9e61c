"""Which programs load which of the files that are written here. The page docs/lora-files.md shows the same table.

Sources: the loaders of ComfyUI 0.33, mflux 0.24, diffusers 0.42, DiffSynth-Studio, InvokeAI, musubi-tuner's
convert_lora.py, ai-toolkit and stable-diffusion.cpp. Their rules are in tests/support/lora_clients.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .kinds import Dense, DoRA, Hadamard
from .kronecker import Kronecker
from .low_rank import LowRank
from .updates import BIAS, LoRA
from .whole import Whole

_LOW_RANK = LowRank.title
_ITS_OWN = "burn"  # z-image-train loads no other naming, and no other program loads this one
_DOTTED = ("comfy", "peft", "kohya")  # the namings with dots, below a prefix that every program knows


@dataclass(frozen=True)
class Client:
    """What one program loads. A naming or a kind that is not named here is lost, most often without a word."""

    name: str
    namings: tuple[str, ...]
    kinds: tuple[str, ...] = (_LOW_RANK,)  # titles; for differences of norms and biases see `norms`
    norms: bool = False
    untried: tuple[str, ...] = ()  # namings that nobody has tried


CLIENTS = (
    Client("ComfyUI", _DOTTED, (_LOW_RANK, Dense.title, Kronecker.title, Hadamard.title, Whole.title), norms=True),
    Client("mflux", (*_DOTTED, "musubi"), norms=True),
    Client("diffusers", (*_DOTTED, "musubi"), (_LOW_RANK, Kronecker.title)),
    Client("InvokeAI", _DOTTED),
    Client("DiffSynth-Studio", ("comfy", "kohya")),
    Client("musubi-tuner", (*_DOTTED, "musubi")),
    Client("ai-toolkit", ("comfy",), untried=("peft", "kohya", "musubi")),
    Client(
        "stable-diffusion.cpp", _DOTTED, (_LOW_RANK, Dense.title, Kronecker.title, Hadamard.title), norms=True,
    ),
    Client("z-image-train", (_ITS_OWN,)),
)  # fmt: skip


def losses(lora: LoRA, naming: str) -> list[str]:
    """The losses of `lora` in this naming that are known, in sentences. Empty if no loss is known."""
    if naming == _ITS_OWN:
        return [f"only z-image-train loads the {naming} naming"]
    others = [client for client in CLIENTS if client.namings != (_ITS_OWN,)]
    without = [client.name for client in others if naming not in (*client.namings, *client.untried)]
    said = [f"{', '.join(without)}: known to lose keys of the {naming} naming"] if without else []
    return said + losses_of({_kind(name, update.title) for name, update in lora.items()}, naming)


def losses_of(kinds: Iterable[str], naming: str) -> list[str]:
    """Which programs load updates of these kinds (titles) in this naming, in sentences."""
    said, found = [], set(kinds)
    for kind in sorted(found - {_LOW_RANK}):
        able = [client.name for client in CLIENTS if naming in client.namings and _loads(client, kind)]
        those = f"only {', '.join(able)}" if able else "no other program"
        said.append(f"{kind}: {those} is known to load it from the {naming} naming")
    if DoRA.title in found:
        said.append(f"{DoRA.title}: ComfyUI computes it by its own formula, so its pictures differ")
    return said


_NORM = "difference of a norm or bias"


def _kind(name: str, title: str) -> str:
    single = name.endswith(BIAS) or "norm" in name or name == "cap_embedder.0"
    return _NORM if single and title == Dense.title else title


def _loads(client: Client, kind: str) -> bool:
    return client.norms if kind == _NORM else kind in client.kinds
